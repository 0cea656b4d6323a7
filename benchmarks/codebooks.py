"""Each codebook on Gaussian weights: its mean squared error, the least possible error, and the speed of encoding.

    python benchmarks/codebooks.py [--vectors N] [--scan-vectors N] [--repeats N]

The source is the unit Gaussian; errors are for one weight. "error" is at the scale that the package uses. "best" is at the
best scale of a fine scan (for E8P with a second stage also over the residual scale), on the same weights. "bound" is the
bound of rate-distortion theory, 2^(−2·bits). "known" is an independent value: published, in closed form, or by a plain
search through the whole table, on fewer weights, compared with the error on the same weights. Speeds are per second of CPU
time of all threads: medians of runs in turns.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time

import machine
import torch

from transformers_quip import codebooks
from transformers_quip.codebooks import Codebook, d4, e8, e8p

WEIGHTS_AT_ONCE = 1 << 20
# Uniform quantizers of a Gaussian: J. Max, Quantizing for minimum distortion, IRE Trans. Inf. Theory 6 (1960), table II.
PUBLISHED = {"scalar2": 0.1188, "scalar3": 0.03744, "scalar4": 0.01154, "half-integer": 0.01154}
# For every stage, the function that makes the table of its points.
TABLES = {
    "e8p": (e8p.points,),
    "d4": (d4.points,),
    "e8p-rvq3": (e8p.points, e8.points),
    "e8p-rvq4": (e8p.points, e8p.points),
}


def error_at(book: Codebook, scale: float, x: torch.Tensor) -> float:
    """Mean squared error of the weights x [N] when their rms is `scale` in units of the points."""
    total = 0.0
    for part in x.split(WEIGHTS_AT_ONCE):
        _, points = book.encode((part * scale).reshape(-1, book.block_size))
        total += (points.flatten().double() / scale - part).square().sum().item()
    return total / len(x)


def minimum(function, low: float, high: float, tolerance: float) -> tuple[float, float]:
    """(argument, value) of the minimum of a function that falls and then rises, by golden sections."""
    ratio = (math.sqrt(5) - 1) / 2
    inner = [high - ratio * (high - low), low + ratio * (high - low)]
    values = [function(point) for point in inner]
    while high - low > tolerance:
        if values[0] < values[1]:
            high, inner = inner[1], [inner[1] - ratio * (inner[1] - low), inner[0]]
            values = [function(inner[0]), values[0]]
        else:
            low, inner = inner[0], [inner[1], inner[0] + ratio * (high - inner[0])]
            values = [values[1], function(inner[1])]
    return min(zip(inner, values, strict=True), key=lambda pair: pair[1])


def best_scale(book: Codebook, x: torch.Tensor) -> tuple[float, float]:
    """(scale, error) where the error on the weights x is least."""
    scale = book.gaussian_scale
    return minimum(lambda s: error_at(book, s, x), 0.8 * scale, 1.25 * scale, 0.002 * scale)


def best_scales(name: str, x: torch.Tensor) -> tuple[float, float, float]:
    """(scale, residual scale, error) of a codebook of two stages where the error on the weights x is least."""
    own = codebooks.get(name).residual_scale
    found = {}

    def error(residual_scale: float) -> float:
        found[residual_scale] = best_scale(codebooks.get(name).with_residual_scale(residual_scale), x)
        return found[residual_scale][1]

    residual_scale, least = minimum(error, 0.75 * own, 1.3 * own, 0.01 * own)
    return found[residual_scale][0], residual_scale, least


def table_error(book: Codebook, x: torch.Tensor) -> float:
    """The error of plain searches through the tables, stage by stage, for the weights x [N]."""
    rest, unit = (x * book.gaussian_scale).reshape(-1, book.block_size), book.gaussian_scale
    for stage, points in enumerate(TABLES[book.name]):
        if stage:
            rest, unit = rest / book.residual_scale, unit / book.residual_scale
        table = points()
        norms = table.square().sum(1) / 2
        parts = rest.split(64)
        rest = torch.cat([part - table[torch.addmm(norms, part, table.T, beta=-1).argmax(1)] for part in parts])
    return rest.double().square().sum().item() / len(x) / unit**2


def speeds(books: list[Codebook], weights: int, repeats: int) -> dict[str, float]:
    """Weights encoded per CPU second by each codebook: the median of runs in turns."""
    x = torch.randn(weights, generator=torch.Generator().manual_seed(1))
    times: dict[str, list[float]] = {book.name: [] for book in books}
    for _ in range(repeats):
        for book in books:
            vectors = (x * book.gaussian_scale).reshape(-1, book.block_size)
            start = time.process_time()
            book.encode(vectors)
            times[book.name].append(time.process_time() - start)
    return {name: weights / statistics.median(found) for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=1 << 20, help="vectors of 8 weights for the errors")
    parser.add_argument("--scan-vectors", type=int, default=1 << 17, help="vectors for the scan of scales")
    parser.add_argument("--table-vectors", type=int, default=1 << 13, help="vectors for the plain search")
    parser.add_argument("--repeats", type=int, default=9, help="runs for the speeds")
    options = parser.parse_args()

    x = torch.randn(8 * options.vectors, generator=torch.Generator().manual_seed(0))
    scan, few = x[: 8 * options.scan_vectors], x[: 8 * options.table_vectors]
    books = [codebooks.get(name) for name in codebooks.names()]
    rates = speeds(books, 1 << 21, options.repeats)
    rows = []
    print(
        f"{'codebook':13s} {'bits':>4s} {'bound':>9s} {'error':>9s} {'best':>9s} {'ratio':>6s} {'known':>9s}  scales, speed"
    )
    for book in books:
        row = {"codebook": book.name, "bits": book.bits, "bound": 2 ** (-2 * book.bits)}
        row |= {"scale": book.gaussian_scale, "residual_scale": book.residual_scale}
        row["error"] = error_at(book, book.gaussian_scale, x)
        if book.residual_scale:
            row["best_scale"], row["best_residual_scale"], least = best_scales(book.name, scan)
        else:
            row["best_scale"], least = best_scale(book, scan)
        row["error_to_best"] = error_at(book, book.gaussian_scale, scan) / least
        row["best"] = row["error"] / row["error_to_best"]
        if book.name in TABLES:
            row["known"] = table_error(book, few)
            row["error_on_same"] = error_at(book, book.gaussian_scale, few)
        elif book.name in PUBLISHED:
            row["known"] = PUBLISHED[book.name]
        row |= {"weights_per_cpu_second": rates[book.name], "speed_to_e8p": rates[book.name] / rates["e8p"]}
        rows.append(row)
        second = f"/{row['best_residual_scale']:.4f} (used {book.residual_scale:.4f})" if book.residual_scale else ""
        print(
            f"{book.name:13s} {book.bits:4g} {row['bound']:9.3g} {row['error']:9.4g} {row['best']:9.4g} "
            f"{row['error_to_best']:6.4f} {row.get('known', math.nan):9.4g}  {row['best_scale']:.4f} (used "
            f"{book.gaussian_scale:.4f}){second}, {row['weights_per_cpu_second']:.3g}/s, {row['speed_to_e8p']:.2f} x E8P"
        )
    machine.save("codebooks", {"vectors": options.vectors, "rows": rows})


if __name__ == "__main__":
    main()
