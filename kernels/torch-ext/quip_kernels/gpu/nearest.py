"""The nearest points of E8P, its second stages and grids, and rounding with feedback: the encoders of weights on GPUs.

A program has a few rows, and compares each with all candidates of `..nearest` side by side. In a panel of columns it goes
from the last block to the first and keeps the panel in registers, so a panel is one launch, and the host reads nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .. import nearest as tables
from .launch import device_of, interpreted

MOST_COLUMNS = 128
# Rows of a program: the interpreter takes its time for each program, not for each row.
BLOCK_ROWS = 256 if interpreted() else 8
# Bit of the low byte of a code that holds the sign of weight 0 … 7.
_SIGN_BITS = tl.constexpr((0, 4, 1, 5, 2, 6, 3, 7))
# Adding and subtracting it rounds numbers below 2^22 to integers, halves to even ones.
_INTEGERS = tl.constexpr(12582912.0)
SECOND = {None: 0, "e8p": 1, "e8": 2}
# In the place of a second stage: no E8P, but a grid of single numbers.
GRID = tl.constexpr(3)


# Conditions as numbers: AMD's registers for conditions are few.
@triton.jit
def _sign(x):
    """1 if x is negative, else 0."""
    return x.to(tl.uint32, bitcast=True) >> 31


@triton.jit
def _is_equal(a, B: tl.constexpr):
    """1 if a = B, else 0, for small numbers that are not negative."""
    return ((a ^ B) - 1).to(tl.uint32, bitcast=True) >> 31


@triton.jit
def _nearest_on_side(
    x,
    side,
    vectors,
    biases,
    about,
    signed,
    COUNT: tl.constexpr,
    EVEN: tl.constexpr,
    ODD: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """Code, point and squared distance of the nearest point v + 1/4 on side 0, v − 1/4 on side 1."""
    shift = 0.25 - 0.5 * side
    y = ()
    odd = tl.zeros(x[0].shape, tl.int32)
    smallest = tl.zeros(x[0].shape, tl.int32)
    least = tl.abs(x[0] - shift)
    for j in tl.static_range(8):
        z = x[j] - shift
        odd ^= _sign(z).to(tl.int32, bitcast=True)
        smallest = tl.where(tl.abs(z) < least, j, smallest)
        least = tl.minimum(tl.abs(z), least)
        y = y + (tl.abs(z),)
    best = tl.full(x[0].shape, -1e38, tl.float32)
    winner = tl.zeros(x[0].shape, tl.int32)
    for begin in range(0, COUNT, TOGETHER):
        # the coordinate of y that this group of candidates meets negated; 8: none
        negated = tl.where((odd == 1) == (begin < EVEN), smallest, 8)
        negated = tl.where(begin < ODD, negated, 8)
        candidate = begin + tl.arange(0, TOGETHER)
        score = tl.load(biases + candidate)[None, :] + tl.where((odd == 1) & (begin >= ODD), -1e30, 0.0)[:, None]
        for j in tl.static_range(8):
            f = (y[j].to(tl.uint32, bitcast=True) ^ (_is_equal(negated, j) << 31)).to(tl.float32, bitcast=True)
            score += f[:, None] * tl.load(vectors + begin * 8 + j * TOGETHER + tl.arange(0, TOGETHER))[None, :]
        most, place = tl.max(score, 1, return_indices=True)
        better = most > best
        winner = tl.where(better, begin + place, winner)
        best = tl.where(better, most, best)

    number = tl.load(about + winner)
    pattern = number & 0xFF
    changed = number >> 8  # 1 + the coordinate that the candidate negates
    coordinate = tl.where(changed > 0, changed - 1, smallest)
    changes = tl.where(changed > 0, 1, odd ^ (winner >= EVEN).to(tl.int32)).to(tl.uint32, bitcast=True)
    code = ((pattern << 8) | side).to(tl.uint32, bitcast=True)
    distance = tl.zeros(x[0].shape, tl.float32)
    points = ()
    for j in tl.static_range(8):
        z = x[j] - shift
        v = tl.load(signed + pattern * 8 + j)
        bits = v.to(tl.uint32, bitcast=True)
        negative = _sign(z) ^ (changes & _is_equal(coordinate, j))
        code ^= (negative ^ (bits >> 31)) << _SIGN_BITS[j]
        value = ((bits & 0x7FFFFFFF) | (negative << 31)).to(tl.float32, bitcast=True)
        distance += (z - value) * (z - value)
        points = points + (value + shift,)
    return code.to(tl.int32, bitcast=True), points, distance


@triton.jit
def _nearest_e8p(
    x, vectors, biases, about, signed, COUNT: tl.constexpr, EVEN: tl.constexpr, ODD: tl.constexpr, TOGETHER: tl.constexpr
):
    """Code and point; of two points at the same distance, the one shifted by +1/4."""
    code = tl.zeros(x[0].shape, tl.int32)
    nearest = tl.full(x[0].shape, 1e38, tl.float32)
    points = x
    for side in range(0, 2):  # not side by side: that takes four times as long to compile, and spills registers
        found, point, distance = _nearest_on_side(x, side, vectors, biases, about, signed, COUNT, EVEN, ODD, TOGETHER)
        is_nearer = (distance < nearest) | (side == 0)  # distances may not be numbers
        code = tl.where(is_nearer, found, code)
        nearest = tl.where(is_nearer, distance, nearest)
        closest = ()
        for j in tl.static_range(8):
            closest = closest + (tl.where(is_nearer, point[j], points[j]),)
        points = closest
    return code, points


@triton.jit
def _nearest_e8(x, e8, TOGETHER: tl.constexpr):
    """Code and point of the 256 of E8, whose table is e8 [256 / TOGETHER, 8, TOGETHER]."""
    best = tl.full(x[0].shape, -1e38, tl.float32)
    winner = tl.zeros(x[0].shape, tl.int32)
    for begin in range(0, 256, TOGETHER):
        score = tl.zeros([x[0].shape[0], TOGETHER], tl.float32)
        for j in tl.static_range(8):
            v = tl.load(e8 + begin * 8 + j * TOGETHER + tl.arange(0, TOGETHER))[None, :]
            score += (x[j][:, None] - 0.5 * v) * v
        most, place = tl.max(score, 1, return_indices=True)
        better = most > best
        winner = tl.where(better, begin + place, winner)
        best = tl.where(better, most, best)
    points = ()
    for j in tl.static_range(8):
        points = points + (tl.load(e8 + (winner // TOGETHER * 8 + j) * TOGETHER + winner % TOGETHER),)
    return winner, points


@triton.jit
def _nearest(
    x,
    vectors,
    biases,
    about,
    signed,
    e8,
    scale,
    COUNT: tl.constexpr,
    EVEN: tl.constexpr,
    ODD: tl.constexpr,
    TOGETHER: tl.constexpr,
    SECOND: tl.constexpr,
):
    """Code and point of both stages: p + scale · q, q nearest to (x − p) / scale. GRID: k − scale / 2, k = 0 … scale."""
    if SECOND == GRID:
        half = scale * 0.5
        number = (tl.minimum(tl.maximum(x[0] + half, 0.0), scale) + _INTEGERS) - _INTEGERS
        return number.to(tl.int32), (number - half,)
    else:
        code, points = _nearest_e8p(x, vectors, biases, about, signed, COUNT, EVEN, ODD, TOGETHER)
        if SECOND == 0:
            return code, points
        else:
            inverse = 1.0 / scale
            rest = ()
            for j in tl.static_range(8):
                rest = rest + ((x[j] - points[j]) * inverse,)
            if SECOND == 1:
                low, second = _nearest_e8p(rest, vectors, biases, about, signed, COUNT, EVEN, ODD, TOGETHER)
                code = (code << 16) | low
            else:
                low, second = _nearest_e8(rest, e8, TOGETHER)
                code = (code.to(tl.int16).to(tl.int32) << 8) | low
            total = ()
            for j in tl.static_range(8):
                total = total + (points[j] + scale * second[j],)
            return code, total


@triton.jit
def encode_kernel(
    x,
    vectors,
    biases,
    about,
    signed,
    e8,
    scale,
    codes,
    points,
    rows,
    COUNT: tl.constexpr,
    EVEN: tl.constexpr,
    ODD: tl.constexpr,
    TOGETHER: tl.constexpr,
    SECOND: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """codes [rows] and points [rows, 8] nearest to x [rows, 8]; BLOCK_ROWS rows a program."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < rows
    given = ()
    for j in tl.static_range(8):
        given = given + (tl.load(x + row * 8 + j, mask=inside, other=0.0),)
    code, found = _nearest(given, vectors, biases, about, signed, e8, scale, COUNT, EVEN, ODD, TOGETHER, SECOND)
    tl.store(codes + row, code.to(codes.dtype.element_ty), mask=inside)
    for j in tl.static_range(8):
        tl.store(points + row * 8 + j, found[j], mask=inside)


@triton.jit
def _block_of(panel, block, SIZE: tl.constexpr):
    """The columns of a block of a panel [R, SIZE · blocks], each [R]; SIZE is 1 or 8."""
    R: tl.constexpr = panel.shape[0]
    BLOCKS: tl.constexpr = panel.shape[1] // SIZE
    apart = tl.reshape(panel, [R, BLOCKS, SIZE])
    own = tl.sum(tl.where(tl.arange(0, BLOCKS)[None, :, None] == block, apart, 0.0), 1)
    if SIZE == 1:
        return (tl.reshape(own, [R]),)
    else:
        # column 4a + 2b + c as [R, a, b, c]; a split takes the last dimension apart
        even, odd = tl.split(tl.reshape(own, [R, 2, 2, 2]))
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        c0, c4 = tl.split(x0)
        c1, c5 = tl.split(x1)
        c2, c6 = tl.split(x2)
        c3, c7 = tl.split(x3)
        return (c0, c1, c2, c3, c4, c5, c6, c7)


@triton.jit
def panel_kernel(
    target,
    base,
    feedback,
    vectors,
    biases,
    about,
    signed,
    e8,
    scale,
    codes,
    points,
    delta,
    rows,
    blocks,
    COUNT: tl.constexpr,
    EVEN: tl.constexpr,
    ODD: tl.constexpr,
    TOGETHER: tl.constexpr,
    SECOND: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Every block of a panel [rows, columns], from the last to the first, with feedback; see `round_panel`."""
    SIZE: tl.constexpr = 1 if SECOND == GRID else 8
    columns = blocks * SIZE
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, WIDTH)
    inside = row < rows
    known = inside[:, None] & (column < columns)[None, :]
    wanted = tl.load(target + row[:, None] * columns + column[None, :], mask=known, other=0.0)
    for step in range(0, blocks):
        block = blocks - 1 - step
        x = _block_of(wanted, block, SIZE)
        code, found = _nearest(x, vectors, biases, about, signed, e8, scale, COUNT, EVEN, ODD, TOGETHER, SECOND)
        tl.store(codes + row * blocks + block, code.to(codes.dtype.element_ty), mask=inside)
        for j in tl.static_range(SIZE):
            place = row * columns + block * SIZE + j
            error = tl.load(base + place, mask=inside, other=0.0) - found[j]
            tl.store(points + place, found[j], mask=inside)
            tl.store(delta + place, error, mask=inside)
            factor = tl.load(feedback + (block * SIZE + j) * columns + column, mask=column < block * SIZE, other=0.0)
            wanted += error[:, None] * factor[None, :]


def encode(x: torch.Tensor, second: str | None = None, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest E8P point of every vector, and the nearest point of a second stage to the rest.

    Args:
        x: float32 [N, 8], contiguous.
        second: "e8p", "e8" or None.
        scale: of the second stage.

    Returns:
        codes [N]: int16, or int32 with the second stage in the low 16 (E8P) or 8 (E8) bits; the points, float32 [N, 8].
    """
    codes = torch.empty(len(x), dtype=torch.int32 if second else torch.int16, device=x.device)
    points = torch.empty_like(x)
    if len(x):
        with device_of(x):
            encode_kernel[(triton.cdiv(len(x), BLOCK_ROWS),)](
                x,
                *_tables(x.device),
                scale,
                codes,
                points,
                len(x),
                **_constants(second),
                num_warps=4,
            )
    return codes, points


def round_panel(
    target: torch.Tensor, base: torch.Tensor, feedback: torch.Tensor, second: str | None = None, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Encode a panel from the last block to the first: x_k = target_k + Σ_{j>k} (base − point)_j feedback[j, k].

    Args:
        target, base: float32 [rows, columns], contiguous; columns a multiple of 8, at most `MOST_COLUMNS`.
        feedback: float32 [columns, columns], contiguous; only what is below the diagonal blocks is read.
        second, scale: see [`encode`].

    Returns:
        codes [rows, columns / 8] as from [`encode`], points and base − points, float32 [rows, columns].
    """
    code_dtype = torch.int32 if second else torch.int16
    return _round(target, base, feedback, _tables(target.device), scale, code_dtype, _constants(second))


def round_scalar_panel(
    target: torch.Tensor, base: torch.Tensor, feedback: torch.Tensor, largest: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[`round_panel`] for a grid of single weights, k − largest / 2 for k = 0 … largest; codes uint8 [rows, columns]."""
    constants = {"COUNT": 0, "EVEN": 0, "ODD": 0, "TOGETHER": 0, "SECOND": GRID.value, "BLOCK_ROWS": BLOCK_ROWS}
    return _round(target, base, feedback, (target,) * 5, float(largest), torch.uint8, constants)  # no table is read


def _round(
    target: torch.Tensor,
    base: torch.Tensor,
    feedback: torch.Tensor,
    given: tuple[torch.Tensor, ...],
    scale: float,
    code_dtype: torch.dtype,
    constants: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, columns = target.shape
    blocks = columns if constants["SECOND"] == GRID.value else columns // 8
    codes = torch.empty(rows, blocks, dtype=code_dtype, device=target.device)
    points, delta = torch.empty_like(target), torch.empty_like(target)
    if target.numel():
        with device_of(target):
            panel_kernel[(triton.cdiv(rows, BLOCK_ROWS),)](
                target,
                base,
                feedback,
                *given,
                scale,
                codes,
                points,
                delta,
                rows,
                blocks,
                **constants,
                WIDTH=MOST_COLUMNS,
                num_warps=4,
            )
    return codes, points, delta


def _tables(device: torch.device) -> tuple[torch.Tensor, ...]:
    found = tables.candidates(device)
    return found.vectors, found.biases, found.about, tables.signed_patterns(device), tables.e8_points(device)


def _constants(second: str | None) -> dict[str, Any]:
    even, odd, count = tables.candidates(torch.device("cpu")).ends
    return {
        "COUNT": count,
        "EVEN": even,
        "ODD": odd,
        "TOGETHER": tables.TOGETHER,
        "SECOND": SECOND[second],
        "BLOCK_ROWS": BLOCK_ROWS,
    }
