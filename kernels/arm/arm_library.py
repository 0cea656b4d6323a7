"""The C library on 64-bit ARM, in an emulator, in the place of this machine's (a plugin of pytest: -p arm_library).

PyTorch stays on this machine. The arguments of every call, with all memory that they point to, go to a process of QEMU
(driver.c), and the results come back. QUIP_ARM_PROCESSOR names the processor, by default the best of
`arm_program.PROCESSORS`.
`--arm-share quick` takes a part of the tests, always the same.
"""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import arm_program

from quip_kernels import cpu_library, cpu_records
from quip_kernels.cpu_library import LayerArguments, TransformArguments, TransformCall, TrellisArguments

PROCESSOR_VARIABLE = "QUIP_ARM_PROCESSOR"
# Tests that start a process, which has this machine's library.
_NOT_HERE = ("test_threads_of_its_own_and_levels_by_the_environment", "test_an_unknown_level_is_an_error")
# Tests that take many seconds in an emulator.
_LONG = (
    "test_products_with_all_codes_and_every_coordinate[0]",
    "test_threads_do_not_change_a_bit",
    "test_transform_is_the_kronecker_product[False-2048]",
    "test_transform_is_the_kronecker_product[True-2048]",
    "test_threads_and_number_of_tiles_change_nothing",
)
_QUICK = 5  # one of this number of tests
# In the order of the numbers in driver.c.
NAMES = (
    "quip_encode",
    "quip_round_panel",
    "quip_round_panel_scalar",
    "quip_linear",
    "quip_decode",
    "quip_transform_vectors",
    "quip_trellis_linear",
    "quip_trellis_decode",
    "quip_viterbi",
    "quip_has_amx",
    "quip_cpu_level",
    "quip_to_nibbles",
    "quip_from_nibbles",
    "quip_trellis_expand",
)
_WIDTHS = {0: 4, 1: 2, 2: 2}  # bytes of a number, by its type in the C source
_STAGE_BYTES = {0: 0, 1: 1, 2: 2}  # of a code, by the codebook's number; nibbles of eight weights take four
_CODE_WIDTHS = {0: 2, 1: 4, 2: 4}  # bytes of a code of the encoder, by the second stage


class Call:
    """The arguments of one call, with the memory that they point to."""

    def __init__(self, name: str):
        self.number = NAMES.index(name)
        self.arguments: list[int] = []
        self.pieces: list[tuple[int, int, bool]] = []  # address, bytes, whether it is written
        self.links: list[tuple[int, int, int, int]] = []

    def whole(self, *values: int) -> None:
        self.arguments += values

    def real(self, value: float) -> None:
        self.arguments.append(struct.unpack("<i", struct.pack("<f", value))[0])

    def pointer(self, address: int | None, size: int, written: bool = False) -> None:
        """An argument that points to `size` bytes."""
        self._link(-1, 8 * len(self.arguments), address, size, written)
        self.arguments.append(0)

    def inside(self, piece: int, offset: int, address: int | None, size: int, written: bool = False) -> int:
        """A pointer to `size` bytes at this place of a piece; returns the number of the piece that it points to."""
        return self._link(piece, offset, address, size, written)

    def _link(self, piece: int, offset: int, address: int | None, size: int, written: bool = False) -> int:
        if not address:
            return -1
        self.pieces.append((address, size, written))
        self.links.append((piece, offset, len(self.pieces) - 1, 0))
        return len(self.pieces) - 1

    def message(self, repeats: int = 1) -> bytes:
        sizes = [size if written else -size for _, size, written in self.pieces]
        links = [number for link in self.links for number in link]
        numbers = [self.number, repeats, len(self.arguments), len(sizes), len(self.links), *self.arguments, *sizes, *links]
        return struct.pack(f"<{len(numbers)}q", *numbers) + b"".join(
            ctypes.string_at(address, size) for address, size, _ in self.pieces
        )


def _transform(call: Call, piece: int, offset: int, address: int | None) -> None:
    """The transform that the pointer at this place of a piece points to."""
    if not address:
        return
    found = TransformArguments.from_address(address)
    here = call.inside(piece, offset, address, ctypes.sizeof(TransformArguments))
    for i in range(found.count):
        order = found.orders[i]
        for name in ("factors", "transposed"):
            place = getattr(TransformArguments, name).offset + 8 * i
            call.inside(here, place, getattr(found, name)[i], 4 * order * order)


def _layer(call: Call, piece: int, offset: int, layer: LayerArguments, code_bytes: int, residual_bytes: int) -> None:
    """The pointers of a layer that lies at `offset` in a piece."""
    for name, size in (
        ("codes", code_bytes),
        ("residual", residual_bytes),
        ("su", layer.n * _WIDTHS[layer.su_type]),
        ("sv", layer.m * _WIDTHS[layer.sv_type]),
        ("bias", layer.m * _WIDTHS[layer.bias_type]),
    ):
        call.inside(piece, offset + getattr(LayerArguments, name).offset, getattr(layer, name), size)
    for name in ("transform_in", "transform_out"):
        _transform(call, piece, offset + getattr(LayerArguments, name).offset, getattr(layer, name))


def _vectors(call: Call, layer: LayerArguments, x: int, y: int, count: int, stride: int, x_type: int, y_type: int) -> None:
    """x, y, count, stride and their types, as arguments."""
    call.pointer(x, ((count - 1) * stride + layer.n) * _WIDTHS[x_type] if count else 0)
    call.pointer(y, count * layer.m * _WIDTHS[y_type], written=True)
    call.whole(count, stride, x_type, y_type)


def _widths(second: int, nibbles: int) -> tuple[int, int]:
    """Bytes of eight weights of either stage."""
    return 4 if nibbles & 1 else 2, 4 if nibbles & 2 else _STAGE_BYTES[second]


def _linear(call: Call, address: int, *vectors: int) -> None:
    *vectors, planes, level, threads = vectors
    layer = LayerArguments.from_address(address)
    codes = layer.m * -(-layer.n // 8)
    call.pointer(address, ctypes.sizeof(LayerArguments))
    _layer(call, 0, 0, layer, *(codes * width for width in _widths(layer.second, layer.nibbles)))
    _vectors(call, layer, *vectors)
    call.whole(planes, level, threads)


def _trellis(call: Call, address: int) -> LayerArguments:
    """A trellis-coded layer, as an argument."""
    weight = TrellisArguments.from_address(address)
    layer = weight.layer
    call.pointer(address, ctypes.sizeof(TrellisArguments))
    rows, size = cpu_records.shape_of_records(layer.m, layer.n, weight.pair_bits)
    _layer(call, 0, 0, layer, rows * size if weight.form else layer.m * layer.n * weight.pair_bits // 16, 0)
    table = weight.step * _WIDTHS[weight.table_type] << weight.table_bits
    call.inside(0, TrellisArguments.table.offset, weight.table, table)
    return layer


def _trellis_linear(call: Call, address: int, *vectors: int) -> None:
    *vectors, level, threads = vectors
    _vectors(call, _trellis(call, address), *vectors)
    call.whole(level, threads)


def _trellis_decode(call: Call, address: int, out: int, kind: int, level: int, threads: int) -> None:
    layer = _trellis(call, address)
    call.pointer(out, layer.m * layer.n * _WIDTHS[kind], written=True)
    call.whole(kind, level, threads)


def _trellis_expand(call: Call, address: int, records: int, level: int, threads: int) -> None:
    layer = _trellis(call, address)
    rows, size = cpu_records.shape_of_records(layer.m, layer.n, TrellisArguments.from_address(address).pair_bits)
    call.pointer(records, rows * size, written=True)
    call.whole(level, threads)


def _decode(call, codes, residual, second, scale, rows, columns, out, kind, nibbles, level, threads):
    count, (first_width, second_width) = rows * -(-columns // 8), _widths(second, nibbles)
    call.pointer(codes, count * first_width)
    call.pointer(residual, count * second_width)
    call.whole(second)
    call.real(scale)
    call.whole(rows, columns)
    call.pointer(out, rows * columns * _WIDTHS[kind], written=True)
    call.whole(kind, nibbles, level, threads)


def _to_nibbles(call: Call, codebook: int, codes: int, rows: int, blocks: int, out: int, threads: int) -> None:
    call.whole(codebook)
    call.pointer(codes, rows * blocks * _STAGE_BYTES[codebook])
    call.whole(rows, blocks)
    call.pointer(out, rows * blocks * 4, written=True)
    call.whole(threads)


def _from_nibbles(call: Call, codebook: int, nibbles: int, rows: int, blocks: int, codes: int, threads: int) -> None:
    call.whole(codebook)
    call.pointer(nibbles, rows * blocks * 4)
    call.whole(rows, blocks)
    call.pointer(codes, rows * blocks * _STAGE_BYTES[codebook], written=True)
    call.whole(threads)


def _transform_vectors(call: Call, address: int) -> None:
    found = TransformCall.from_address(address)
    size = TransformArguments.from_address(found.transform).size
    call.pointer(address, ctypes.sizeof(TransformCall), written=False)
    vectors = ((found.count - 1) * found.x_stride + size) if found.count else 0
    call.inside(0, TransformCall.x.offset, found.x, vectors * _WIDTHS[found.x_type])
    call.inside(0, TransformCall.y.offset, found.y, found.count * size * _WIDTHS[found.y_type], written=True)
    for name in ("before", "after", "bias"):
        width = _WIDTHS[getattr(found, f"{name}_type")]
        call.inside(0, getattr(TransformCall, name).offset, getattr(found, name), size * width)
    _transform(call, 0, TransformCall.transform.offset, found.transform)


def _encode(call, x, count, second, scale, codes, points, threads):
    call.pointer(x, 32 * count)
    call.whole(count, second)
    call.real(scale)
    call.pointer(codes, count * _CODE_WIDTHS[second], written=True)
    call.pointer(points, 32 * count, written=True)
    call.whole(threads)


def _panel(call: Call, given: Sequence[int], rows: int, columns: int) -> None:
    """target, base and feedback, rows and columns."""
    for address, size in zip(given, (rows * columns, rows * columns, columns * columns), strict=True):
        call.pointer(address, 4 * size)
    call.whole(rows, columns)


def _round_panel(call, target, base, feedback, rows, columns, second, scale, codes, points, delta, threads):
    _panel(call, (target, base, feedback), rows, columns)
    call.whole(second)
    call.real(scale)
    call.pointer(codes, rows * columns // 8 * _CODE_WIDTHS[second], written=True)
    call.pointer(points, 4 * rows * columns, written=True)
    call.pointer(delta, 4 * rows * columns, written=True)
    call.whole(threads)


def _round_panel_scalar(call, target, base, feedback, rows, columns, largest, codes, points, delta, threads):
    _panel(call, (target, base, feedback), rows, columns)
    call.whole(largest)
    call.pointer(codes, rows * columns, written=True)
    call.pointer(points, 4 * rows * columns, written=True)
    call.pointer(delta, 4 * rows * columns, written=True)
    call.whole(threads)


def _viterbi(call, x, count, levels, weights, even, odd, doublings, window, passes, states, level, threads):
    call.pointer(x, 512 * count)
    call.whole(count)
    call.pointer(levels, weights * 2 * 65536)
    call.whole(weights, even, odd, doublings, window, passes)
    call.pointer(states, 2 * count * (256 // weights), written=True)
    call.whole(level, threads)


def _nothing(call: Call) -> None:
    return None


_DESCRIBE: tuple[Callable[..., None], ...] = (
    _encode,
    _round_panel,
    _round_panel_scalar,
    _linear,
    _decode,
    _transform_vectors,
    _trellis_linear,
    _trellis_decode,
    _viterbi,
    _nothing,
    _nothing,
    _to_nibbles,
    _from_nibbles,
    _trellis_expand,
)


def describe(name: str, *arguments) -> Call:
    """The call of a function with the arguments that ctypes would get."""
    call = Call(name)
    # ctypes.byref gives an object that does not tell its address
    values = [ctypes.addressof(value._obj) if hasattr(value, "_obj") else value for value in arguments]
    _DESCRIBE[call.number](call, *values)
    return call


class Library:
    """The functions of the library, in an emulated process."""

    def __init__(self, program: Path, processor: str):
        self._process = subprocess.Popen(
            arm_program.command(program, processor), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def __enter__(self) -> Library:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def __getattr__(self, name: str) -> Callable[..., int]:
        if name not in NAMES:
            raise AttributeError(name)
        return lambda *arguments: self._run(name, describe(name, *arguments))

    def quip_share_threads(self, entry: int | None) -> None:
        """Threads of PyTorch cannot be used there: the library makes its own."""

    def _run(self, name: str, call: Call) -> int:
        process = self._process
        assert process.stdin is not None
        try:
            process.stdin.write(call.message())
            process.stdin.flush()
            result = struct.unpack("<q", self._read(8))[0]
            for address, size, written in call.pieces:
                if written:
                    ctypes.memmove(address, self._read(size), size)
        except (BrokenPipeError, EOFError):
            raise RuntimeError(f"the emulated program ended in {name}, with exit code {process.wait()}") from None
        return result

    def _read(self, size: int) -> bytes:
        assert self._process.stdout is not None
        found = self._process.stdout.read(size)
        if len(found) < size:
            raise EOFError
        return found


def pytest_addoption(parser) -> None:
    parser.addoption("--arm-share", choices=("all", "quick"), default="all", help="of the tests of the emulated library")


def pytest_collection_modifyitems(config, items: list) -> None:
    """Leave out the tests that make no sense here and, of a quick run, most of the others."""

    def is_wanted(item) -> bool:
        if item.originalname in _NOT_HERE:
            return False
        if config.getoption("--arm-share") == "all":
            return True
        if item.name in _LONG or item.originalname in _LONG:
            return False
        return zlib.crc32(item.nodeid.encode()) % _QUICK == 0

    left_out = [item for item in items if not is_wanted(item)]
    items[:] = [item for item in items if is_wanted(item)]
    config.hook.pytest_deselected(items=left_out)


def pytest_configure(config) -> None:
    """Put the emulated library in the place of this machine's, before a test imports the modules that use it."""
    found = Library(arm_program.build(), os.environ.get(PROCESSOR_VARIABLE) or [*arm_program.PROCESSORS.values()][-1])
    cpu_library.library = lambda: found
    cpu_library.LEVELS = cpu_library.LEVELS_OF["arm"]
