"""One quantized linear layer on the CPU against PyTorch's dense one and against our reference, by instruction set.

    python benchmarks/cpu_kernels.py [--threads N ...] [--vectors N ...] [--shapes MxN ...] [--seconds S]
                                     [--codebooks NAME ...] [--trellis NAME ...] [--shared]

All variants compute in turns within one run, and medians are compared. "products" are the codes times a vector alone; a
"layer" has the transforms, su and sv as well; "op" is `torch.ops.quip.linear`, Python included. Before anything is timed,
each layer is checked against a float64 computation. --codebooks: E8P ("e8p") by itself or with a second stage ("e8p-rvq3",
"e8p-rvq4"). With --trellis the codes are of those codebooks instead, and errors are saved, too. With --shared, for a
machine that others use too, one thread's CPU time is measured and minima are compared.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import time
from collections.abc import Callable

import machine
import torch

import transformers_quip  # noqa: F401 - registers the ops
from quip_kernels import cpu, cpu_library, cpu_nibbles, cpu_records
from quip_kernels import cpu_linear as kernels
from quip_kernels import cpu_trellis as trellis_kernels
from transformers_quip import codebooks, incoherence
from transformers_quip.checkpoints.foreign import trellis_bits
from transformers_quip.ops import reference

STAGES = ("e8p", "e8p-rvq3", "e8p-rvq4")  # codebooks of the library, besides trellises
SHAPES = ("1536x576", "4096x4096", "14336x4096")
ACTIVATIONS = {1: "int8", 2: "int16", 3: "exact"}
ACCURACY = {1: 2e-2, 2: 6e-3, 3: 6e-3}  # of bfloat16 results


def ways_of(codebook: str, m: int, n: int, vectors: int) -> dict[str, Callable[[], torch.Tensor]]:
    """Every way to compute a random layer of E8P, with or without a second stage, of this shape for bfloat16 vectors."""
    generator = torch.Generator().manual_seed(0)
    book = codebooks.get(codebook)
    stored = {
        name: torch.randint(-(2**15), 2**15, grid.shape, generator=generator).to(grid.dtype)
        for name, grid in book.tensors(m, n).items()
    }
    codes, *rest = stored.values()
    second = {"codes_residual": rest[0], "residual_scale": book.residual_scale} if rest else {}
    su, sv = (incoherence.signs(size, 0, role).bfloat16() for size, role in ((n, "in"), (m, "out")))
    x = torch.randn(vectors, n, generator=generator).bfloat16()
    dense = torch.randn(m, n, generator=generator).bfloat16()
    transforms = [incoherence.get("hadamard", size, 0) for size in (n, m)]
    q_in, q_out = (kernels.Transform(q.dense_factors) for q in transforms)
    x_single, dense_single = x.float(), dense.float()
    arguments = (x, [codes, *rest], su, sv, None, codebook, "hadamard", "hadamard", 0)

    weight = book.decode(stored, n, torch.float64)
    z = transforms[0].apply_transpose(x.double() * su.double()) @ weight.T
    expected = transforms[1].apply(z) * sv.double()

    ways = {
        "dense bfloat16": lambda: torch.nn.functional.linear(x, dense),
        "dense float32": lambda: torch.nn.functional.linear(x_single, dense_single),
        "reference": lambda: reference.linear(*arguments),
        "op": lambda: torch.ops.quip.linear(*arguments),
    }
    checked = {"reference": 6e-3, "op": 1e-2}
    for level in range(1, cpu_library.default_level() + 1):
        for planes, activations in ACTIVATIONS.items():
            if cpu_library.LEVELS[level] == "avx2" and m % cpu_nibbles.TILE == 0:
                forms = [cpu_nibbles.expand(grid) for grid in (codes, *rest)]
                expanded = {**second, "codes_residual": forms[1]} if rest else {}
                name = f"avx2 expanded {activations} layer"
                ways[name] = lambda planes=planes, level=level, forms=forms, expanded=expanded: kernels.linear(
                    x, forms[0], su, sv, None, q_in, q_out, planes, level=level, **expanded
                )
                checked[name] = ACCURACY[planes]
            kind = f"{cpu_library.LEVELS[level]} {activations}"
            ways[f"{kind} products"] = lambda planes=planes, level=level: kernels.linear(
                x, codes, None, None, None, None, None, planes, level=level, **second
            )
            ways[f"{kind} layer"] = lambda planes=planes, level=level: kernels.linear(
                x, codes, su, sv, None, q_in, q_out, planes, level=level, **second
            )
            checked[f"{kind} layer"] = ACCURACY[planes]
    for name, most in checked.items():
        error = ((ways[name]().double() - expected).norm() / expected.norm()).item()
        if error > most:
            raise SystemExit(f"{name} at {m}x{n}: relative error {error:.2g}, at most {most} was expected")
    return ways


def trellis_ways(name: str, m: int, n: int, vectors: int) -> tuple[dict[str, Callable[[], torch.Tensor]], dict[str, float]]:
    """As [`ways_of`], for codes of a trellis codebook; and the time to decode the weight, and to re-pack it from EXL3.

    Also the relative errors of products and layers against float64.
    """
    book = codebooks.get(name)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-(2**15), 2**15, book.tensors(m, n)["codes"].shape, generator=generator).to(torch.int16)
    table = None if book.table_shape is None else torch.randn(book.table_shape, generator=generator).half()
    su, sv = (incoherence.signs(size, 0, role).bfloat16() for size, role in ((n, "in"), (m, "out")))
    x = torch.randn(vectors, n, generator=generator).bfloat16()
    x_single, dense = x.float(), torch.randn(m, n, generator=generator).bfloat16()
    dense_single = dense.float()
    stored = {"codes": codes} if table is None else {"codes": codes, "table": table}
    arguments = (x, list(stored.values()), su, sv, None, name, "hadamard", "hadamard", 0)
    layout = trellis_kernels.Layout(book.code, book.k, book.order)
    foreign = torch.randint(-(2**15), 2**15, (n // 16, m // 16, int(16 * book.k)), generator=generator).to(torch.int16)
    transforms = [incoherence.get("hadamard", size, 0) for size in (n, m)]
    q_in, q_out = (kernels.Transform(q.dense_factors) for q in transforms)

    weight = book.decode(stored, n).double()
    of_products = x.double() @ weight.T
    z = transforms[0].apply_transpose(x.double() * su.double()) @ weight.T
    of_layer = transforms[1].apply(z) * sv.double()

    def products(level: int, codes: torch.Tensor, exact: bool) -> torch.Tensor:
        return trellis_kernels.products(x_single, codes, layout, table, level, exact)

    def layer(level: int, codes: torch.Tensor, exact: bool) -> torch.Tensor:
        return trellis_kernels.linear(x, codes, su, sv, None, q_in, q_out, layout, table, level, exact)

    ways = {
        "dense bfloat16": lambda: torch.nn.functional.linear(x, dense),
        "dense float32": lambda: torch.nn.functional.linear(x_single, dense_single),
        "reference decode": lambda: book.decode(stored, n, torch.bfloat16),
        "re-packing": lambda: trellis_bits.from_exl3(foreign),
        "op": lambda: torch.ops.quip.linear(*arguments),
    }
    checked: dict[str, tuple[torch.Tensor, float]] = {}
    for level in range(cpu_library.library().quip_cpu_level() + 1):
        kind = cpu_library.LEVELS[level]
        ways[f"{kind} decode"] = lambda level=level: trellis_kernels.decode(codes, n, torch.bfloat16, layout, table, level)
        forms = [("", codes, True, 1e-6, 6e-3)]
        if kind in cpu_library.LEVELS_FOR_RECORDS and cpu_records.can_expand(codes, layout.pair_bits, table):
            forms.append((" bytes", trellis_kernels.expand(codes, layout, table), False, 1.2e-2, 1.4e-2))
            ways[f"{kind} expand"] = lambda level=level: trellis_kernels.expand(codes, layout, table, level)
        for form, tensor, exact, of_product, of_whole in forms:
            ways[f"{kind}{form} products"] = functools.partial(products, level, tensor, exact)
            ways[f"{kind}{form} layer"] = functools.partial(layer, level, tensor, exact)
            checked[f"{kind}{form} products"] = of_products, of_product
            checked[f"{kind}{form} layer"] = of_layer, of_whole
    errors = {}
    for way, (expected, most) in checked.items():
        errors[way] = ((ways[way]().double() - expected).norm() / expected.norm()).item()
        if errors[way] > most:
            raise SystemExit(f"{way} of {name} at {m}x{n}: relative error {errors[way]:.2g}")
    return ways, errors


def times_of(ways: dict[str, Callable[[], torch.Tensor]], seconds: float, shared: bool) -> dict[str, float]:
    """Time of a call of each way, measured in turns for about this many seconds each: the median, or the least CPU time."""
    clock = time.thread_time if shared else time.perf_counter
    repeats = {}
    for name, way in ways.items():
        start = clock()
        way()
        repeats[name] = max(1, int(0.005 / (clock() - start)))
    times: dict[str, list[float]] = {name: [] for name in ways}
    stop = clock() + seconds * len(ways)
    while clock() < stop or min(map(len, times.values())) < 5:
        for name, way in ways.items():
            start = clock()
            for _ in range(repeats[name]):
                way()
            times[name].append((clock() - start) / repeats[name])
    return {name: min(found) if shared else statistics.median(found) for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--vectors", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="MxN")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each way")
    parser.add_argument("--codebooks", nargs="+", default=["e8p"], metavar="NAME", choices=STAGES)
    parser.add_argument("--trellis", nargs="+", metavar="NAME", help='codebooks such as "trellis:mul1:k2:exl3"')
    parser.add_argument("--shared", action="store_true", help="the least CPU time of one thread")
    options = parser.parse_args()
    if not cpu.is_available():
        raise SystemExit("nothing to measure: the CPU library was not compiled")

    if options.shared:
        options.threads = [1]
        torch.set_num_threads(1)
    rows = []
    for codebook, shape, vectors in itertools.product(
        options.trellis or options.codebooks, options.shapes, options.vectors
    ):
        m, n = map(int, shape.split("x"))
        errors: dict[str, float] = {}
        if options.trellis:
            ways, errors = trellis_ways(codebook, m, n, vectors)
        else:
            ways = ways_of(codebook, m, n, vectors)
        for threads in options.threads:
            torch.set_num_threads(threads)
            found = times_of(ways, options.seconds, options.shared)
            print(f"\n{codebook}, {shape}, {vectors} vectors, {threads} threads")
            print(f"{'way':26s} {'us':>10s} {'Gweights/s':>11s} {'x bfloat16':>11s} {'x float32':>10s}")
            for name, taken in found.items():
                row = {
                    "codebook": codebook,
                    "shape": shape,
                    "vectors": vectors,
                    "threads": threads,
                    "way": name,
                    "microseconds": taken * 1e6,
                    "gweights_per_second": m * n / taken / 1e9,
                    "times_dense_bfloat16": found["dense bfloat16"] / taken,
                    "times_dense_float32": found["dense float32"] / taken,
                }
                numbers = list(row.values())[5:]
                rows.append({**row, "relative_error": errors[name]} if name in errors else row)
                print(f"{name:26s} {numbers[0]:10.1f} {numbers[1]:11.2f} {numbers[2]:11.2f} {numbers[3]:10.2f}")
    machine.save("cpu_trellis" if options.trellis else "cpu_kernels", {"rows": rows})


if __name__ == "__main__":
    main()
