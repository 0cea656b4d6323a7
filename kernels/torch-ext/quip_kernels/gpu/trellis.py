"""Trellis codes on GPUs: products with a few vectors, and the decoded weight. The codes are read as they are stored.

Codes and tables are described in `transformers_quip.codebooks.trellis`. A lane has sixteen consecutive weights of a tile's
sequence: lane g has the weights 16g to 16g + 15. Weight i of every lane then takes its state from the same bits of the
lane's own words, so all shifts are constants. With half bits every second lane begins in the middle of a word; its words
are moved by a byte first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import arch, device_of, processors
from .trellis_values import computed, tabulated

MOST_VECTORS = 8
MOST_TOGETHER = 4  # vectors of one program
TILE = 16
CODES = ("1mad", "2mad", "3inst", "mcg", "mul1", "hyb", "quantlut", "lut")
ORDERS = ("rows", "qtip", "exl3")
BITS, HALF_BITS = (1, 2, 3, 4, 5, 6, 7, 8), (1.5, 2.5, 3.5)


@triton.jit
def _windows(codes, lane, first_word, inside, PAIR_BITS: tl.constexpr):
    """For each lane: ⌈K⌉ blocks of 32 bits (uint32), number c from the lane's bit 16·c on; PAIR_BITS is 2·K.

    first_word: of the lane's tile; the tile's last lane goes on there.
    """
    WORDS: tl.constexpr = 8 * PAIR_BITS
    HALF: tl.constexpr = PAIR_BITS % 2
    word = lane * PAIR_BITS // 2
    previous = tl.load(codes + first_word + word, mask=inside, other=0).to(tl.uint16, bitcast=True).to(tl.uint32)
    words = ()
    for c in tl.static_range((PAIR_BITS + 1) // 2 + HALF):
        following = tl.load(codes + first_word + (word + c + 1) % WORDS, mask=inside, other=0)
        following = following.to(tl.uint16, bitcast=True).to(tl.uint32)
        words = words + ((previous << 16) | following,)
        previous = following
    if HALF:
        windows = ()
        for c in tl.static_range((PAIR_BITS + 1) // 2):
            windows = windows + (tl.where(lane % 2 == 1, (words[c] << 8) | ((words[c + 1] >> 8) & 0xFF), words[c]),)
        return windows
    else:
        return words


@triton.jit
def _weights(
    windows,
    i: tl.constexpr,
    table,
    PAIR_BITS: tl.constexpr,
    CODE: tl.constexpr,
    STEP: tl.constexpr,
    TABLE_BITS: tl.constexpr,
    HALVES: tl.constexpr,
    ARCH: tl.constexpr,
):
    """Weights i … i + STEP − 1 of every lane: a tuple of float32 blocks."""
    BEGIN: tl.constexpr = (i * PAIR_BITS + 1) // 2
    s = (windows[BEGIN // 16] >> (16 - BEGIN % 16)) & 0xFFFF
    if TABLE_BITS > 0:
        return tabulated(table, s, CODE, TABLE_BITS, STEP, HALVES)
    else:
        return (computed(s, CODE, ARCH),)


@triton.jit
def _column(lane, i: tl.constexpr, ORDER: tl.constexpr):
    """Column in its tile of weight i of a lane."""
    if ORDER == "rows":
        return lane * 0 + i
    elif ORDER == "qtip":
        return (lane & 1) * 4 + ((i >> 3) * 2 + (i & 1) + (i >> 2 & 1) * 8)
    else:
        return (lane & 1) * 4 + ((i >> 3) * 2 + (i & 1) + (i >> 1 & 1) * 8)


@triton.jit
def trellis_matvec_kernel(
    x,
    codes,
    table,
    parts,
    tile_rows,
    tiles,
    vectors,
    tiles_per_part,
    factor,
    PAIR_BITS: tl.constexpr,
    CODE: tl.constexpr,
    ORDER: tl.constexpr,
    STEP: tl.constexpr,
    TABLE_BITS: tl.constexpr,
    HALVES: tl.constexpr,
    VECTORS: tl.constexpr,
    BLOCK: tl.constexpr,
    ARCH: tl.constexpr,
):
    """parts [P, vectors, 16·tile_rows] of factor · Ŵ x, x [vectors, 16·tiles] float32.

    Program (r, p, v) has row r of tiles, the p-th part of its tiles and VECTORS of the vectors; vectors is a multiple of
    that, or the last are computed twice. BLOCK tiles are worked on at a time.
    """
    row = tl.program_id(0)
    part = tl.program_id(1)
    first = tl.minimum(tl.program_id(2) * VECTORS, vectors - VECTORS)
    codes += row.to(tl.int64) * tiles * (8 * PAIR_BITS)
    lane = tl.arange(0, 16)[None, :]
    # Weights of one lane lie in one row of the tile, or in two that are eight rows apart.
    SETS: tl.constexpr = 1 if ORDER == "rows" else 2
    totals = (tl.zeros([BLOCK, 16], tl.float32),) * (VECTORS * SETS)
    end = tl.minimum((part + 1) * tiles_per_part, tiles)
    for begin in range(part * tiles_per_part, end, BLOCK):
        tile = (begin + tl.arange(0, BLOCK))[:, None]
        inside = (tile < end) & (lane >= 0)
        windows = _windows(codes, lane, tile * (8 * PAIR_BITS), inside, PAIR_BITS)
        for step in tl.static_range(16 // STEP):
            weights = _weights(windows, step * STEP, table, PAIR_BITS, CODE, STEP, TABLE_BITS, HALVES, ARCH)
            for j in tl.static_range(STEP):
                source = x + tile * 16 + _column(lane, step * STEP + j, ORDER)
                new_totals = ()
                for t in tl.static_range(VECTORS * SETS):
                    # bit 1 or bit 2 of a weight's place in its lane says which of the two rows
                    if t % SETS == ((step * STEP + j) >> (1 if ORDER == "qtip" else 2)) % SETS:
                        value = tl.load(source + (first + t // SETS) * (tiles * 16), mask=inside, other=0.0)
                        new_totals = new_totals + (totals[t] + weights[j] * value,)
                    else:
                        new_totals = new_totals + (totals[t],)
                totals = new_totals
    for v in tl.static_range(VECTORS):
        y = parts + (part * vectors + first + v) * (tile_rows * 16) + row * 16
        for chosen in tl.static_range(SETS):
            total = tl.sum(totals[v * SETS + chosen], 0) * factor
            if ORDER == "rows":
                tl.store(y + tl.arange(0, 16), total)
            else:
                tl.store(y + chosen * 8 + tl.arange(0, 8), tl.sum(tl.reshape(total, [8, 2]), 1))


@triton.jit
def trellis_dequantize_kernel(
    codes,
    table,
    weight,
    tiles,
    divisor,
    PAIR_BITS: tl.constexpr,
    CODE: tl.constexpr,
    ORDER: tl.constexpr,
    STEP: tl.constexpr,
    TABLE_BITS: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK: tl.constexpr,
    ARCH: tl.constexpr,
):
    """weight [16·rows of tiles, 16·tiles] of codes; program (b, r) has BLOCK tiles of row r of tiles."""
    row = tl.program_id(1).to(tl.int64)
    codes += row * tiles * (8 * PAIR_BITS)
    lane = tl.arange(0, 16)[None, :]
    tile = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[:, None]
    inside = (tile < tiles) & (lane >= 0)
    windows = _windows(codes, lane, tile * (8 * PAIR_BITS), inside, PAIR_BITS)
    values = ()
    for step in tl.static_range(16 // STEP):
        values = values + _weights(windows, step * STEP, table, PAIR_BITS, CODE, STEP, TABLE_BITS, HALVES, ARCH)
    # Joining adds a last dimension: bits 3, 2, 1 and 0 of i, in this order
    for level in tl.static_range(4):
        joined = ()
        for i in tl.static_range(8 >> level):
            joined = joined + (tl.join(values[i], values[i + (8 >> level)]),)
        values = joined
    whole = values[0]
    if CODE == "1mad" or CODE == "2mad":
        whole = tl.div_rn(whole, tl.full(whole.shape, 1.0, tl.float32) * divisor)
    whole = whole.to(weight.dtype.element_ty)
    # [tile, bits of the sequence] → [row, tile, column]
    if ORDER == "rows":
        whole = tl.permute(tl.reshape(whole, [BLOCK, 16, 16]), [1, 0, 2])
    elif ORDER == "qtip":
        # q₇q₆q₅, q₄, q₃, q₂, q₁, q₀ → q₁, q₇q₆q₅; q₂, q₄, q₃, q₀
        whole = tl.permute(tl.reshape(whole, [BLOCK, 8, 2, 2, 2, 2, 2]), [5, 1, 0, 4, 2, 3, 6])
    else:
        whole = tl.permute(tl.reshape(whole, [BLOCK, 8, 2, 2, 2, 2, 2]), [4, 1, 0, 5, 2, 3, 6])
    whole = tl.reshape(whole, [16, BLOCK * 16])
    column = (tl.program_id(0) * (BLOCK * 16) + tl.arange(0, BLOCK * 16))[None, :]
    target = weight + (row * 16 + tl.arange(0, 16)[:, None]) * (tiles * 16) + column
    tl.store(target, whole, mask=column < tiles * 16)


def matvec(
    x: torch.Tensor, codes: torch.Tensor, code: str, k: float, order: str, table: torch.Tensor | None = None
) -> torch.Tensor:
    """Ŵ x for up to eight vectors, in float32.

    Args:
        x: float32 [M, n], contiguous, M at most `MOST_VECTORS`, n a multiple of 16.
        codes: int16 [m, n/16·K], contiguous, m a multiple of 16.
        code, k, order: one of `CODES`, bits per weight, and one of `ORDERS`.
        table: floating point [2^Q, V], contiguous, for the last three of `CODES`.

    Returns:
        float32 [P, M, m]: the result is the sum over the first dimension, the parts into which long rows were cut so that
        every multiprocessor has work.

    Raises:
        ValueError: too many vectors, or shapes that do not belong together.
    """
    _check(codes, x.shape[-1], code, k, order, table)
    table = _as_kernels_read(table)
    vectors, columns = x.shape
    if not 1 <= vectors <= MOST_VECTORS or x.dtype != torch.float32:
        raise ValueError(f"x must be float32 with 1 to {MOST_VECTORS} vectors, got {x.dtype} {list(x.shape)}")
    rows, tiles = codes.shape[0] // TILE, columns // TILE
    together = min(vectors, MOST_TOGETHER)
    tiles_at_once = block(together)
    # four programs for each multiprocessor hide the latency of memory; a part is not shorter than two blocks
    wanted = triton.cdiv(4 * processors(codes.device), max(rows, 1))
    blocks = triton.cdiv(tiles, tiles_at_once)
    tiles_per_part = triton.cdiv(blocks, max(1, min(wanted, blocks // 2))) * tiles_at_once
    parts = triton.cdiv(tiles, tiles_per_part)
    result = torch.empty(parts, vectors, rows * TILE, dtype=torch.float32, device=x.device)
    if result.numel():
        with device_of(x):
            trellis_matvec_kernel[(rows, parts, triton.cdiv(vectors, together))](
                x,
                codes,
                codes if table is None else table,
                result,
                rows,
                tiles,
                vectors,
                tiles_per_part,
                1 / 147.800537109375 if code in ("1mad", "2mad") else 1.0,
                **_constants(code, k, order, table),
                VECTORS=together,
                BLOCK=tiles_at_once,
                ARCH=arch(),
                num_warps=4,
            )
    return result


def block(vectors: int) -> int:
    """Tiles that a program of the product works on at once, so that the sums for this many vectors fit into registers."""
    return 16 if vectors <= 2 else 8


def dequantize(
    codes: torch.Tensor,
    columns: int,
    dtype: torch.dtype,
    code: str,
    k: float,
    order: str,
    table: torch.Tensor | None = None,
) -> torch.Tensor:
    """The decoded weight of trellis codes.

    Args:
        codes, code, k, order, table: see [`matvec`].
        columns: n.
        dtype: float16, bfloat16 or float32.

    Returns:
        Ŵ [m, columns], contiguous: the values of float32, rounded to the dtype.

    Raises:
        ValueError: shapes that do not belong together.
    """
    _check(codes, columns, code, k, order, table)
    table = _as_kernels_read(table)
    rows, tiles = codes.shape[0] // TILE, columns // TILE
    weight = torch.empty(rows * TILE, columns, dtype=dtype, device=codes.device)
    if weight.numel():
        with device_of(codes):
            trellis_dequantize_kernel[(triton.cdiv(tiles, 8), rows)](
                codes,
                codes if table is None else table,
                weight,
                tiles,
                147.800537109375,
                **_constants(code, k, order, table),
                BLOCK=8,
                ARCH=arch(),
                num_warps=4,
            )
    return weight


def _constants(code: str, k: float, order: str, table: torch.Tensor | None) -> dict:
    """The constants that kernels are specialised for."""
    return {
        "PAIR_BITS": int(2 * k),
        "CODE": code,
        "ORDER": order,
        "STEP": 1 if table is None else 2 if table.dim() == 1 else table.shape[1],
        "TABLE_BITS": 0 if table is None else table.shape[0].bit_length() - 1,
        "HALVES": table is not None and table.dtype == torch.int32,
    }


def _as_kernels_read(table: torch.Tensor | None) -> torch.Tensor | None:
    """The table: int32 [2^Q], two numbers in a word, if it is of pairs in float16; else as it is."""
    if table is None or table.shape[1] != 2 or table.dtype != torch.float16:
        return table
    return table.detach().contiguous().view(torch.int32).flatten()


def _check(codes: torch.Tensor, columns: int, code: str, k: float, order: str, table: torch.Tensor | None) -> None:
    if code not in CODES or order not in ORDERS or k not in BITS + HALF_BITS * (code == "mul1"):
        raise ValueError(
            f"unknown trellis of code {code!r}, {k} bits and order {order!r}: codes are {', '.join(CODES)}, bits 1 to "
            f"8 (of mul1 also 1.5, 2.5 and 3.5), orders {', '.join(ORDERS)}"
        )
    expected = (codes.shape[0], columns // TILE * k)
    if codes.dtype != torch.int16 or tuple(codes.shape) != expected or columns % TILE or codes.shape[0] % TILE:
        raise ValueError(
            f"codes of {columns} columns with {k} bits are int16 [m, {expected[1]:g}], m and n multiples of {TILE}, got "
            f"{codes.dtype} {list(codes.shape)}"
        )
    has_table = code in CODES[5:]
    size = None if table is None else tuple(table.shape)
    if (size is not None) != has_table or (size and (size[0] & (size[0] - 1) or size[1:] not in ((1,), (2,)))):
        raise ValueError(f"code {code} {'needs a' if has_table else 'has no'} table [2^Q, 1 or 2], got {size}")
