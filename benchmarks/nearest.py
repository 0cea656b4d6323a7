"""Nearest-point search in the E8P codebook against a plain search of the whole table, in weights per second.

    python benchmarks/nearest.py [--vectors N] [--table-vectors N] [--repeats N]

All ways search the same Gaussian vectors in the same run, in turns; the medians are compared. The plain search is one
matrix product with all 65536 points and an argmax, in chunks of the best size on this machine. Before anything is
timed, each way's points are checked against the plain search's: every distance must be the same.
"""

from __future__ import annotations

import argparse
import statistics
import time
from unittest import mock

import machine
import torch

from quip_kernels import cpu
from transformers_quip import codebooks
from transformers_quip.codebooks import e8p

CHUNKS = (16, 64, 256, 1024)


def table_search(x: torch.Tensor, points: torch.Tensor, norms: torch.Tensor, chunk: int) -> torch.Tensor:
    """Return the index of the nearest of `points` [65536, 8] for every x [N, 8]; `norms` are |p|² / 2."""
    scores = (torch.addmm(norms, part, points.T, beta=-1) for part in x.split(chunk))
    return torch.cat([score.argmax(1) for score in scores])


def seconds(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=1 << 19, help="for the project's search")
    parser.add_argument("--table-vectors", type=int, default=1 << 13, help="for the plain search")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()

    book = codebooks.get("e8p")
    points = e8p.points()
    norms = points.square().sum(1) / 2
    x = torch.randn(max(options.vectors, options.table_vectors), 8, generator=torch.Generator().manual_seed(0))
    few, many = x[: options.table_vectors], x[: options.vectors]

    def plain():
        return table_search(few, points, norms, chunk)

    def with_pytorch(data):
        with mock.patch.object(cpu, "is_available", return_value=False):
            return book.encode(data)

    chunk = min(CHUNKS, key=lambda size: seconds(lambda: table_search(few[:1024], points, norms, size)))
    ways = {"PyTorch path": (with_pytorch, many)}
    if cpu.is_available():
        ways["compiled"] = (book.encode, many)

    best = (few - points[plain()]).double().square().sum(1)
    for name, (search, _) in ways.items():
        found = (few - search(few)[1]).double().square().sum(1)
        worse = (found - best).abs().max().item()
        if worse > 1e-5:
            raise SystemExit(f"{name}: a squared distance differs from the table search's by {worse:.3g}")

    times: dict[str, list[float]] = {"plain table": []} | {name: [] for name in ways}
    for _ in range(options.repeats):
        times["plain table"].append(seconds(plain))
        for name, (search, data) in ways.items():
            times[name].append(seconds(lambda search=search, data=data: search(data)))

    counts = {"plain table": len(few)} | {name: len(data) for name, (_, data) in ways.items()}
    rates = {name: 8 * counts[name] / statistics.median(found) for name, found in times.items()}
    rows = []
    print(f"{'search':14s} {'weights/s':>12s} {'x plain':>9s}")
    for name, rate in rates.items():
        ratio = rate / rates["plain table"]
        print(f"{name:14s} {rate:12.3g} {ratio:9.1f}")
        rows.append({"search": name, "vectors": counts[name], "weights_per_second": rate, "times_plain": ratio})
    machine.save("nearest", {"repeats": options.repeats, "table_chunk": chunk, "rows": rows})


if __name__ == "__main__":
    main()
