"""Trellis codes on Gaussian weights: squared error against the bound, and the speed of encoding.

    python benchmarks/trellis.py [--tiles N] [--repeats N] [--names NAME ...]

The source is the unit Gaussian; errors are for one weight, at the scale that the package uses. "bound" is the bound of
rate-distortion theory, 2^(−2·bits). "published" is the error of another encoder, with float32 costs and two whole passes,
in this project's notes. Speeds are weights per second of CPU time, medians of runs in turns: the compiled encoder at every
instruction set, E8P's search, and Viterbi's algorithm in plain PyTorch as QTIP describes it (`plain_viterbi`).
"""

from __future__ import annotations

import argparse
import statistics
import time

import machine
import torch

from quip_kernels import cpu_library, cpu_viterbi
from transformers_quip import codebooks
from transformers_quip.codebooks import viterbi
from transformers_quip.codebooks.trellis import BEST, Trellis

# shared/notes/algorithms.md, section 1: two passes over 384 tiles
PUBLISHED = {
    "hyb-q9v2": {2: 0.0705, 3: 0.0189, 4: 0.0054},
    "3inst": {2: 0.0688, 3: 0.0178, 4: 0.0046},
    "1mad": {2: 0.0688, 3: 0.0176, 4: 0.0045},
    "mcg": {2: 0.0685, 3: 0.0175, 4: 0.0045},
    "mul1": {2: 0.0684, 3: 0.0175, 4: 0.0045},
}
OTHERS = {"hyb-q9v2": "qtip", "3inst": "rows", "1mad": "rows", "mcg": "exl3"}
NAMES = [*BEST.values(), *(f"trellis:{code}:k{k}:{order}" for code, order in OTHERS.items() for k in (2, 3, 4))]


def plain_viterbi(x: torch.Tensor, values: torch.Tensor, bits: int) -> torch.Tensor:
    """The states of closed paths: float32 costs, two passes over the whole tile (QTIP, arXiv 2406.11235, section 3.2)."""
    tiles, weights = x.view(len(x), -1, values.shape[1]), values.shape[1]
    steps, fresh = tiles.shape[1], bits * weights
    edges = len(values) >> fresh

    def run(order: list[int], costs: torch.Tensor, end: torch.Tensor | None) -> list[torch.Tensor]:
        back = []
        for t in order:
            sums = (values - tiles[:, t, None]).square().sum(-1) + costs.repeat_interleave(1 << fresh, 1)
            costs, found = sums.view(len(x), 1 << fresh, edges).min(1)
            back.append(found)
        edge = costs.argmin(1) if end is None else end
        states = []
        for found in reversed(back):
            states.append(found.gather(1, edge[:, None])[:, 0] * edges + edge)
            edge = states[-1] >> fresh
        return states[::-1]

    turned = [(t + steps // 2) % steps for t in range(steps)]
    seam = run(turned, torch.zeros(len(x), edges), None)[steps // 2] >> fresh
    start = torch.full((len(x), edges), torch.inf).scatter_(1, seam[:, None], 0)
    return torch.stack(run(list(range(steps)), start, seam), 1)


def error_of(book: Trellis, x: torch.Tensor) -> float:
    """Mean squared error of the tiles x [N, 256]."""
    scale = book.gaussian_scale
    return (book.encode(x * scale)[1] / scale - x).square().mean().item()


def seconds(function) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def speeds(name: str, x: torch.Tensor, repeats: int) -> dict[str, float]:
    """Weights per CPU second of each encoder, and the error of the plain one, for tiles x [N, 256]."""
    book, e8p = Trellis.parse(name), codebooks.get("e8p")
    values = book.values(book.table, torch.device("cpu")).view(viterbi.STATES, -1)
    metric, fresh = viterbi.metric(values, book.k), viterbi.fresh_bits(book.k, book.step)
    scaled = x * book.gaussian_scale
    tiles, few = viterbi.quantize(scaled, metric), scaled[:4]
    window = min(viterbi.WINDOW, tiles.shape[1])
    runs = {"e8p": (x.numel(), lambda: e8p.encode((x * e8p.gaussian_scale).view(-1, 8)))}
    for level in range(cpu_library.library().quip_cpu_level() + 1):
        arguments = (tiles, metric.levels, fresh, metric.doublings, window, viterbi.PASSES, level)
        runs[cpu_library.LEVELS[level]] = (x.numel(), lambda arguments=arguments: cpu_viterbi.search(*arguments))
    if book.k == int(book.k):
        runs["plain PyTorch"] = (few.numel(), lambda: plain_viterbi(few, values, int(book.k)))
    times: dict[str, list[float]] = {key: [] for key in runs}
    for _ in range(repeats):
        for key, (_, function) in runs.items():
            times[key].append(seconds(function))
    return {key: runs[key][0] / statistics.median(found) for key, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, default=768, help="tiles of 256 weights for the errors")
    parser.add_argument("--repeats", type=int, default=3, help="runs for the speeds; 0 measures errors only")
    parser.add_argument("--names", nargs="+", default=NAMES, help="codebooks")
    options = parser.parse_args()

    x = torch.randn(options.tiles, 256, generator=torch.Generator().manual_seed(0))
    x /= x.square().mean().sqrt()  # so that the sample's own energy does not count
    rows = []
    for name in options.names:
        book = Trellis.parse(name)
        code = name.split(":")[1]
        row = {"codebook": name, "bits": book.bits, "bound": 2 ** (-2 * book.bits), "error": error_of(book, x)}
        if found := PUBLISHED.get(code, {}).get(book.k):
            row |= {"published": found, "to_published": row["error"] / found}
        if options.repeats:
            row["weights_per_cpu_second"] = speeds(name, x[:64], options.repeats)
        rows.append(row)
        print(row, flush=True)
        machine.save("trellis", {"tiles": options.tiles, "rows": rows})


if __name__ == "__main__":
    main()
