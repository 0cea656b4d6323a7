"""One to eight vectors times codes, in integers: one instruction multiplies four weights by four 8-bit digits of x.

The sum over a row is exact (32-bit integers), so the result does not depend on the order of the sum. Only x was rounded,
to the chosen number of digits (`quantize`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .. import e8p, layout
from . import tune
from .decode import load_table, nibbles_of_words
from .dot import dot_bytes
from .launch import arch, device_of, interpreted, processors
from .quantize import Digits

MOST_VECTORS = 8


@triton.jit
def matvec_kernel(
    digits,
    sums,
    scales,
    planes,
    table,
    parts,
    rows,
    vectors,
    quads,
    blocks_per_part,
    factor,
    SIGNED: tl.constexpr,
    VECTORS: tl.constexpr,
    DIGITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    EVEN: tl.constexpr,
    GATHER: tl.constexpr,
    MERGE: tl.constexpr,
    ARCH: tl.constexpr,
):
    """parts [P, vectors, rows] of factor · scale · Ŵ q.

    Program (r, p, v) has BLOCK_ROWS rows, the p-th part of the words and VECTORS of the vectors; vectors is a multiple
    of that, or the last are computed twice.

    EVEN: the words are a multiple of BLOCK_WORDS. MERGE: shift the odd nibbles down, which costs an instruction a code
    and saves half of the accumulators. quads: words / 4, which tells the compiler that rows are aligned to 16 bytes.
    """
    words = quads * 4
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    part = tl.program_id(1)
    # if fewer vectors are left, begin earlier: another program writes the same results
    first = tl.minimum(tl.program_id(2) * VECTORS, vectors - VECTORS)
    digits += first * DIGITS * 8 * words
    sums += first * DIGITS
    scales += first
    # Programs beyond the last row compute the last row again, and do not store it.
    start_of_row = (tl.minimum(row, rows - 1) * words)[:, None]
    signs_plane = planes + tl.cast(rows, tl.int64) * words
    table_values = load_table(table, SIGNED, GATHER)

    SETS: tl.constexpr = 1 if MERGE else 2
    # Addresses that do not depend on the block cost no instructions in the loop, but two registers each. With many vectors
    # the registers do not suffice, and a pointer for each digit of a vector is advanced instead.
    WALK: tl.constexpr = VECTORS * DIGITS > 4
    totals = (tl.zeros([BLOCK_ROWS, BLOCK_WORDS], tl.int32),) * (VECTORS * DIGITS * SETS)
    for block in range(part * blocks_per_part, tl.minimum((part + 1) * blocks_per_part, tl.cdiv(words, BLOCK_WORDS))):
        word = (block * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS))[None, :]
        every_second = 0x0F0F0F0F
        if not EVEN:
            # Nibbles beyond the row are masked anyway, and a masked load would clear its registers first.
            every_second = tl.where(word < words, 0x0F0F0F0F, 0)
            word = tl.where(word < words, word, word % 4)
        place = start_of_row + word  # first of all: a 64-bit pointer to each row would take registers in the loop
        indices = tl.load(planes + place).to(tl.uint32, bitcast=True)
        signs = 0
        if SIGNED:
            signs = tl.load(signs_plane + place).to(tl.uint32, bitcast=True)
        sources = ()
        for t in tl.static_range(VECTORS * DIGITS):
            sources = sources + (digits + t * 8 * words + word,)
        codes = nibbles_of_words(table, table_values, indices, signs, SIGNED, GATHER)
        for i in tl.static_range(4):
            nibbles = codes[i]
            low = (nibbles & every_second).to(tl.int32, bitcast=True)
            high = ((nibbles >> 4) & every_second if MERGE else nibbles & (every_second << 4)).to(tl.int32, bitcast=True)
            new_totals = ()
            new_sources = ()
            for t in tl.static_range(VECTORS * DIGITS):
                source = sources[t] if WALK else digits + (t * 8 + 2 * i) * words + word
                new_sources = new_sources + (source + 2 * words,)
                x_low = tl.load(source)
                x_high = tl.load(source + words)
                total = dot_bytes(low, x_low, totals[t * SETS], ARCH)
                if MERGE:
                    new_totals = new_totals + (dot_bytes(high, x_high, total, ARCH),)
                else:
                    new_totals = new_totals + (total, dot_bytes(high, x_high, totals[t * SETS + 1], ARCH))
            totals = new_totals
            sources = new_sources

    for v in tl.static_range(VECTORS):
        result = tl.zeros([BLOCK_ROWS], tl.float32)
        for d in tl.static_range(DIGITS):
            total = tl.sum(totals[(v * DIGITS + d) * SETS], 1)
            if not MERGE:
                total += tl.sum(totals[(v * DIGITS + d) * SETS + 1], 1) >> 4
            # Σ 4w·q = 2 Σ nibble·q − 15 Σ q (E8: 16); the second sum is of the whole row and goes into the first part
            offset = tl.where(part == 0, tl.load(sums + v * DIGITS + d) * (15 if SIGNED else 16), 0)
            result += (2 * total - offset).to(tl.float32) * (1.0 if d == 0 else (256.0 if d == 1 else 65536.0))
        result *= tl.load(scales + v) * (0.25 * factor)
        tl.store(parts + (part * vectors + first + v) * rows + row, result, mask=row < rows)


def matvec(
    digits: Digits,
    planes: torch.Tensor,
    columns: int,
    residual: torch.Tensor | None = None,
    residual_scale: float = 1.0,
    gather: bool | None = None,
) -> torch.Tensor:
    """Ŵ x for up to eight quantized vectors.

    Args:
        digits: of x, from `quantize` or `transform`; at most `MOST_VECTORS` rows.
        planes: codes of the first stage; residual: of the second or None (`quip_kernels.layout`).
        columns: n.
        residual_scale: factor of the second stage.
        gather: how table entries are fetched, see `decode.look_up`; None chooses.

    Returns:
        float32 [P, M, m]: the result is the sum over the first dimension: the stages, and the parts into which long rows
        were cut so that every multiprocessor has work. The next kernel adds them up.

    Raises:
        ValueError: too many vectors, or shapes that do not belong together.
    """
    stages = layout.stages(planes, columns, residual, residual_scale)
    words = planes.shape[2]
    vectors, count = digits.sums.shape
    if not 1 <= vectors <= MOST_VECTORS:
        raise ValueError(f"{vectors} vectors, expected 1 to {MOST_VECTORS}")
    if tuple(digits.bytes.shape) != (vectors, count, 8, words):
        raise ValueError(f"digits of shape {list(digits.bytes.shape)} do not fit {columns} columns")
    chosen = [_choose(digits, stage, gather) for stage in stages]
    try:
        return _run(digits, stages, chosen)
    except tune.OutOfResources:  # the remembered answer is of another device
        again = [_choose(digits, stage, gather, unfit=tile) for stage, tile in zip(stages, chosen, strict=True)]
        if again == chosen:
            raise
        return _run(digits, stages, again)


def _run(digits: Digits, stages: Sequence[layout.Stage], chosen: list[Tile]) -> torch.Tensor:
    _, rows, words = stages[0].planes.shape
    vectors, device = len(digits.sums), digits.sums.device
    parts = [split(rows, words, tile, processors(device)) for tile in chosen]
    result = torch.empty(sum(parts), vectors, rows, dtype=torch.float32, device=device)
    for stage, tile, out in zip(stages, chosen, result.split(parts), strict=True):
        _launch(digits, stage, tile, out)
    return result


def _choose(digits: Digits, stage: layout.Stage, gather: bool | None, unfit: Tile | None = None) -> Tile:
    """The tile for one stage, the fastest by measurement if there are several."""
    _, rows, words = stage.planes.shape
    vectors, count = digits.sums.shape
    candidates = [tile for tile in tiles(vectors, count, arch()) if gather in (None, tile.gather)]

    def run(tile: Tile) -> None:
        parts = split(rows, words, tile, processors(stage.planes.device))
        _launch(digits, stage, tile, torch.empty(parts, vectors, rows, dtype=torch.float32, device=stage.planes.device))

    name = f"matvec {'e8p' if stage.signed else 'e8'} {vectors}x{count}{'' if gather is None else f' {gather}'}"
    return tune.choose(name, (rows, words), candidates, stage.planes.device, run, unfit)


def _launch(digits: Digits, stage: layout.Stage, tile: Tile, parts: torch.Tensor) -> None:
    _, rows, words = stage.planes.shape
    vectors, count = digits.sums.shape
    grid = (triton.cdiv(rows, tile.rows), parts.shape[0], triton.cdiv(vectors, tile.vectors))
    with device_of(parts):
        matvec_kernel[grid](
            *digits,
            stage.planes,
            stage.table,
            parts,
            rows,
            vectors,
            words // e8p.WORDS_ALIGNMENT,
            triton.cdiv(triton.cdiv(words, tile.words), parts.shape[0]),
            stage.factor,
            SIGNED=stage.signed,
            VECTORS=tile.vectors,
            DIGITS=count,
            BLOCK_ROWS=tile.rows,
            BLOCK_WORDS=tile.words,
            EVEN=words % tile.words == 0,
            GATHER=tile.gather,
            MERGE=tile.merge,
            ARCH=arch(),
            num_warps=tile.warps,
        )


class Tile(NamedTuple):
    """The work of one program of the kernel, and the number of programs.

    Attributes:
        vectors, rows: of the program. words: words of a row read at a time.
        merge: whether odd and even nibbles share an accumulator. gather: see `decode.look_up`.
        warps: of the program. fill: programs for each multiprocessor, by cutting rows, to hide the latency of memory.
    """

    vectors: int
    rows: int
    words: int
    merge: bool
    gather: bool
    warps: int = 4
    fill: int = 4


def tiles(vectors: int, digits: int, arch: str) -> list[Tile]:
    """The tiles to choose from, the first without measuring; all keep their accumulators in registers (see the tests)."""
    vectors = min(vectors, 4 if digits < 3 else 2)
    sets = vectors * digits
    usual = Tile(vectors, 32 if sets <= 4 else 16, 32, sets > 2 or arch == "hip", not interpreted())
    candidates = [usual, usual._replace(fill=8), usual._replace(gather=not usual.gather)]
    if sets <= 2:
        candidates.append(usual._replace(rows=64))
    return candidates


def split(rows: int, words: int, tile: Tile, processors: int) -> int:
    """The number of parts that the words are cut into."""
    blocks = triton.cdiv(words, tile.words)
    wanted = triton.cdiv(tile.fill * processors, triton.cdiv(rows, tile.rows))
    return triton.cdiv(blocks, triton.cdiv(blocks, min(wanted, blocks)))
