"""Count the instructions of the C library on 64-bit ARM, in an emulator; what a processor takes for them is not measured.

    PYTHONPATH=kernels/torch-ext:kernels/arm:benchmarks python kernels/benchmarks/arm.py [--before REVISION] [--only REGEX]

QEMU writes a line for each instruction of the program (driver.c). Counted are those between the begin and the end of a
call, after another one has made the tables. A row is the difference of two calls of different size, divided by the
difference of their weights (or numbers, or states of a trellis at one step): all that depends on the number of vectors or
columns alone is left out. --before counts the C sources of an earlier revision as well, which have plain C only.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import arm_library
import arm_program
import machine
import torch

from quip_kernels import cpu_library, cpu_linear, cpu_trellis
from quip_kernels.cpu_library import LEVELS_OF

LEVELS = LEVELS_OF["arm"]
PROCESSOR = arm_program.PROCESSORS["dotprod"]
COLUMNS = 512
TRELLIS_COLUMNS = 128
STATES = 65536


class Request(NamedTuple):
    """A call, and the number of weights (or other units) that it works on."""

    message: bytes
    units: int


class Case(NamedTuple):
    """One row: calls of two sizes at a level, and what a unit is."""

    unit: str
    requests: Callable[[int], tuple[Request, Request]]
    has_levels: bool = True


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def words(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**15), 2**15, shape, generator=torch.Generator().manual_seed(1)).to(torch.int16)


def message(name: str, *arguments) -> bytes:
    """The call as driver.c reads it."""
    return arm_library.describe(name, *arguments).message()


def products(planes: int, vectors: int, second: torch.dtype | None = None) -> Case:
    x, y = numbers(vectors, COLUMNS), torch.empty(vectors, 32)

    def request(m: int, level: int) -> Request:
        codes = words(m, COLUMNS // 8)
        residual = None if second is None else codes.view(second)[:, : COLUMNS // 8].contiguous()
        layer, address = cpu_linear.layer_of(COLUMNS, (codes, residual, None, None, None), None, None, 0.5)
        made = message("quip_linear", address, x.data_ptr(), y.data_ptr(), vectors, COLUMNS, 0, 0, planes, level, 1)
        return Request(made, layer.m * COLUMNS)

    return Case("weight", lambda level: (request(16, level), request(32, level)))


def nibbles(planes: int, vectors: int) -> Case:
    x, y = numbers(vectors, COLUMNS), torch.empty(vectors, 32)

    def request(m: int, level: int) -> Request:
        found = torch.randint(0, 256, (m // 16, COLUMNS // 4, 8, 4), generator=torch.Generator().manual_seed(2)).to(
            torch.uint8
        )
        _, address = cpu_linear.layer_of(COLUMNS, (found, None, None, None, None), None, None, 1.0)
        made = message("quip_linear", address, x.data_ptr(), y.data_ptr(), vectors, COLUMNS, 0, 0, planes, level, 1)
        return Request(made, m * COLUMNS)

    return Case("weight", lambda level: (request(16, level), request(32, level)))


def decoded(dtype: torch.dtype) -> Case:
    out = torch.empty(32, COLUMNS, dtype=dtype)

    def request(m: int, level: int) -> Request:
        codes, kind = words(m, COLUMNS // 8), cpu_linear.DTYPES[dtype]
        arguments = (codes.data_ptr(), None, 0, 1.0, m, COLUMNS, out.data_ptr(), kind, 0, level, 1)
        return Request(message("quip_decode", *arguments), m * COLUMNS)

    return Case("weight", lambda level: (request(16, level), request(32, level)))


def trellis(code: str, vectors: int, shape: tuple[int, int] | None = None) -> Case:
    layout, n = cpu_trellis.Layout(code, 2, "qtip"), TRELLIS_COLUMNS
    table = None if shape is None else numbers(*shape).half()
    x, y = numbers(vectors, n), torch.empty(vectors, 32)

    def request(m: int, level: int) -> Request:
        codes = words(m, n // 8)
        layer, address = cpu_trellis.layer_of(n, (codes, None, None, None, table), None, None, layout)
        made = message("quip_trellis_linear", address, x.data_ptr(), y.data_ptr(), vectors, n, 0, 0, level, 1)
        return Request(made, layer.layer.m * n)

    return Case("weight", lambda level: (request(16, level), request(32, level)))


def transform(size: int, *factors: int) -> Case:
    matrices = [torch.linalg.qr(numbers(order, order))[0] for order in factors]
    power = size
    for order in factors:
        power //= order
    sylvester = torch.ones(1, 1)
    while sylvester.shape[0] < power:
        sylvester = torch.cat([torch.cat([sylvester, sylvester], 1), torch.cat([sylvester, -sylvester], 1)])
    q = cpu_linear.Transform([*matrices, sylvester / power**0.5])

    def request(count: int) -> Request:
        x, y = numbers(count, size), torch.empty(count, size)
        call = cpu_library.TransformCall(x.data_ptr(), y.data_ptr(), None, None, None, q.address, count, size, transpose=1)
        call.threads = 1
        return Request(message("quip_transform_vectors", cpu_library.ctypes.addressof(call)), count * size)

    return Case("number", lambda level: (request(1), request(2)), has_levels=False)


def encoded(second: int) -> Case:
    codes, points = torch.empty(32, dtype=torch.int32), torch.empty(32, 8)

    def request(count: int) -> Request:
        x = numbers(count, 8)
        arguments = (x.data_ptr(), count, second, 0.3, codes.data_ptr(), points.data_ptr(), 1)
        return Request(message("quip_encode", *arguments), 8 * count)

    return Case("weight", lambda level: (request(16), request(32)), has_levels=False)


def scalar_panel(columns: int) -> Case:
    def request(rows: int) -> Request:
        target, feedback = numbers(rows, columns), numbers(columns, columns)
        codes = torch.empty(rows, columns, dtype=torch.uint8)
        outs = (codes, torch.empty(rows, columns), torch.empty(rows, columns))
        pointers = (v.data_ptr() for v in (target, target, feedback))
        made = message("quip_round_panel_scalar", *pointers, rows, columns, 3, *(v.data_ptr() for v in outs), 1)
        return Request(made, rows * columns)

    return Case("weight", lambda level: (request(16), request(32)), has_levels=False)


CASES: dict[str, Case] = {
    "E8P, int8 activations": products(1, 1),
    "E8P, exact, float32": products(3, 1),
    "E8P, int8 activations, 16 vectors": products(1, 16),
    "E8P in four bits, int8 activations": nibbles(1, 1),
    "E8P in four bits, exact, float32": nibbles(3, 1),
    "E8P and E8, int8 activations": products(1, 1, torch.uint8),
    "E8P twice, int8 activations": products(1, 1, torch.int16),
    "E8P decoded to float32": decoded(torch.float32),
    "E8P decoded to bfloat16": decoded(torch.bfloat16),
    **{f"trellis {code}, 2 bits": trellis(code, 1) for code in cpu_trellis.CODES[:5]},
    "trellis hyb, 2 bits": trellis("hyb", 1, (512, 2)),
    "trellis quantlut, 2 bits": trellis("quantlut", 1, (512, 2)),
    "trellis 2mad, 2 bits, 4 vectors": trellis("2mad", 4),
    "transform of 576": transform(576, 36),
    "transform of 1536": transform(1536, 12),
    "transform of 4096": transform(4096),
    "search of E8P": encoded(0),
    "search of E8P and E8": encoded(1),
    "search of E8P twice": encoded(2),
    "rounding to 4 points, 64 columns": scalar_panel(64),
}
# Steps of the encoder of trellis codes: weights of a state, new bits, doublings. Counted from step to step.
STEPS = {
    "step of the trellis encoder, 1 weight, 2 bits": (1, 2, 0),
    "step of the trellis encoder, 1 weight, 2 bits, large errors": (1, 2, 2),
    "step of the trellis encoder, 2 weights, 4 bits": (2, 4, 0),
}


@contextmanager
def traced(program: Path, given: bytes) -> Iterator[Iterator[bytes]]:
    """The lines that QEMU writes for the instructions of the program with this input."""
    read, write = os.pipe()
    options = ("-singlestep", "-d", "exec,nochain", "-D", f"/dev/fd/{write}")
    process = subprocess.Popen(
        arm_program.command(program, PROCESSOR, *options),
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=(write,),
    )
    os.close(write)

    def feed() -> None:
        assert process.stdin is not None
        try:
            process.stdin.write(given)
            process.stdin.close()
        except BrokenPipeError:
            return  # the reader had enough

    feeder = threading.Thread(target=feed)
    feeder.start()
    try:
        with os.fdopen(read, "rb", buffering=1 << 20) as lines:
            yield iter(lines)
    finally:
        process.kill()
        process.wait()
        feeder.join()


def address_of(program: Path, name: str, source: str = "driver.c") -> bytes:
    """The address of a function of a source file, as QEMU writes it."""
    command = [arm_program.COMPILER.replace("gcc", "readelf"), "-sW", str(program)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    file = ""
    for fields in map(str.split, listed.splitlines()):
        if len(fields) == 8 and fields[3] == "FILE":
            file = fields[7]
        elif len(fields) == 8 and fields[3] == "FUNC" and (file, fields[7]) == (source, name):
            return f"/{int(fields[1], 16):016x}/".encode()
    raise RuntimeError(f"{program} has no function {name} of {source}")


def calls(program: Path, requests: list[Request]) -> list[int]:
    """Instructions of each request, after the first was made once to make tables."""
    begin, end = address_of(program, "call"), address_of(program, "called")
    counts: list[int] = []
    since: int | None = None
    with traced(program, b"".join(request.message for request in [requests[0], *requests])) as lines:
        for number, line in enumerate(lines):
            if begin in line:
                since = number
            elif end in line and since is not None:
                counts.append(number - since)
                since = None
    if len(counts) != 1 + len(requests):
        raise RuntimeError(f"{len(counts)} calls of {1 + len(requests)} were seen")
    return counts[1:]


def step(program: Path, weights: int, bits: int, doublings: int, level: int) -> float:
    """Instructions for a state at a step of the trellis encoder, its share of rebased costs included."""
    x, levels = words(1, 256 // weights, weights), words(weights, STATES)
    states = torch.empty(1, 256 // weights, dtype=torch.int16)
    arguments = (x.data_ptr(), 1, levels.data_ptr(), weights, bits, bits, doublings, 8, 1, states.data_ptr(), level, 1)
    entry, seen = address_of(program, "step", f"viterbi_{LEVELS[min(level, 1)]}.c"), []
    with traced(program, arm_library.describe("quip_viterbi", *arguments).message()) as lines:
        for number, line in enumerate(lines):
            if entry in line:
                seen.append(number)
                if len(seen) == 4:
                    break
    return (seen[3] - seen[1]) / 2 / STATES


def count(program: Path, only: str, levels: range) -> dict[str, dict]:
    """Instructions for a unit, by the level where there are levels."""
    found: dict[str, dict] = {}
    for name, case in CASES.items():
        if not re.search(only, name):
            continue
        asked = levels if case.has_levels else levels[-1:]
        requests = [request for level in asked for request in case.requests(level)]
        counts = calls(program, requests)
        per = [(counts[i + 1] - counts[i]) / (requests[i + 1].units - requests[i].units) for i in range(0, len(counts), 2)]
        names = [LEVELS[level] for level in asked] if case.has_levels else ["all"]
        found[name] = {"unit": case.unit, **{name: round(value, 3) for name, value in zip(names, per, strict=True)}}
        print(f"{name:60} {found[name]}", flush=True)
    for name, (weights, bits, doublings) in STEPS.items():
        if re.search(only, name):
            per = [round(step(program, weights, bits, doublings, level), 3) for level in levels[:2]]
            found[name] = {"unit": "state", **dict(zip(LEVELS, per, strict=False))}
            print(f"{name:60} {found[name]}", flush=True)
    return found


def sources_of(revision: str, folder: Path) -> Path:
    """The C sources of a revision of this repository."""
    archive = subprocess.run(
        ["git", "archive", revision, "kernels/cpu"], cwd=arm_program.ROOT, capture_output=True, check=True
    )
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    return folder / "kernels" / "cpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", metavar="REVISION", help="count its C sources, too")
    parser.add_argument("--only", default="", metavar="REGEX", help="only these cases; nothing is saved")
    options = parser.parse_args()
    result = {"compiler": _first_line(arm_program.COMPILER, "--version"), "processor": PROCESSOR}
    if options.before:
        print(f"before ({options.before}):")
        with tempfile.TemporaryDirectory() as folder:
            program = arm_program.build(sources_of(options.before, Path(folder)), Path(folder) / "objects")
            result |= {"before": options.before, "counts_before": count(program, options.only, range(1))}
        print("now:")
    result["counts"] = count(arm_program.build(), options.only, range(len(LEVELS)))
    if not options.only:
        machine.save("arm", result)


def _first_line(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]


if __name__ == "__main__":
    main()
