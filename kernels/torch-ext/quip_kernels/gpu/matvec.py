"""One to eight vectors times E8P codes, in integers: four weights meet four 8-bit digits of x in one instruction.

The sum over a row is exact (32-bit integers), so the result does not depend on the order in which it is made; only x was
rounded, to as many digits as were asked for (`quantize`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .. import e8p
from .decode import nibbles_of_words
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
    VECTORS: tl.constexpr,
    DIGITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    EVEN: tl.constexpr,
    GATHER: tl.constexpr,
    MERGE: tl.constexpr,
    ARCH: tl.constexpr,
):
    """parts [P, vectors, rows] of scale · Ŵ q.

    Program (r, p, v) has BLOCK_ROWS rows, the p-th part of the words and VECTORS of the vectors; vectors is a multiple
    of that, or the last are computed twice.

    EVEN: the words are a multiple of BLOCK_WORDS. MERGE: shift the odd nibbles down, which costs an instruction a code
    and saves half of the accumulators. quads: words / 4, so that the compiler knows that a row begins at 16 bytes.
    """
    words = quads * 4
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    part = tl.program_id(1)
    # fewer vectors are left: begin earlier, and write the same results as another program
    first = tl.minimum(tl.program_id(2) * VECTORS, vectors - VECTORS)
    digits += first * DIGITS * 8 * words
    sums += first * DIGITS
    scales += first
    # Rows beyond the last compute the last once more, and are not stored.
    start_of_row = (tl.minimum(row, rows - 1) * words)[:, None]
    signs_plane = planes + tl.cast(rows, tl.int64) * words
    table_values = tl.load(table + tl.arange(0, 256)).to(tl.uint32, bitcast=True) if GATHER else 0

    SETS: tl.constexpr = 1 if MERGE else 2
    totals = (tl.zeros([BLOCK_ROWS, BLOCK_WORDS], tl.int32),) * (VECTORS * DIGITS * SETS)
    for block in range(part * blocks_per_part, tl.minimum((part + 1) * blocks_per_part, tl.cdiv(words, BLOCK_WORDS))):
        word = (block * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS))[None, :]
        if EVEN:
            indices = tl.load(planes + start_of_row + word)
            signs = tl.load(signs_plane + start_of_row + word)
        else:
            indices = tl.load(planes + start_of_row + word, mask=word < words, other=0)
            signs = tl.load(signs_plane + start_of_row + word, mask=word < words, other=0)
        indices = indices.to(tl.uint32, bitcast=True)
        signs = signs.to(tl.uint32, bitcast=True)
        codes = nibbles_of_words(table, table_values, indices, signs, GATHER)
        for i in tl.static_range(4):
            nibbles = codes[i]
            low = (nibbles & 0x0F0F0F0F).to(tl.int32, bitcast=True)
            high = ((nibbles >> 4) & 0x0F0F0F0F if MERGE else nibbles & 0xF0F0F0F0).to(tl.int32, bitcast=True)
            new_totals = ()
            for t in tl.static_range(VECTORS * DIGITS):
                source = digits + (t * 8 + 2 * i) * words + word
                if EVEN:
                    x_low = tl.load(source)
                    x_high = tl.load(source + words)
                else:
                    x_low = tl.load(source, mask=word < words, other=0)
                    x_high = tl.load(source + words, mask=word < words, other=0)
                total = dot_bytes(low, x_low, totals[t * SETS], ARCH)
                if MERGE:
                    new_totals = new_totals + (dot_bytes(high, x_high, total, ARCH),)
                else:
                    new_totals = new_totals + (total, dot_bytes(high, x_high, totals[t * SETS + 1], ARCH))
            totals = new_totals

    for v in tl.static_range(VECTORS):
        result = tl.zeros([BLOCK_ROWS], tl.float32)
        for d in tl.static_range(DIGITS):
            total = tl.sum(totals[(v * DIGITS + d) * SETS], 1)
            if not MERGE:
                total += tl.sum(totals[(v * DIGITS + d) * SETS + 1], 1) >> 4
            # Σ 4w·q = 2 Σ nibble·q − 15 Σ q; the second sum is of the whole row and goes into the first part
            offset = tl.where(part == 0, tl.load(sums + v * DIGITS + d) * 15, 0)
            result += (2 * total - offset).to(tl.float32) * (1.0 if d == 0 else (256.0 if d == 1 else 65536.0))
        result *= tl.load(scales + v) * 0.25
        tl.store(parts + (part * vectors + first + v) * rows + row, result, mask=row < rows)


def matvec(digits: Digits, planes: torch.Tensor, columns: int, gather: bool | None = None) -> torch.Tensor:
    """Ŵ x for up to eight quantized vectors.

    Args:
        digits: of x, from `quantize` or `transform`; at most `MOST_VECTORS` rows.
        planes: int32 [2, m, words], the weight in kernel layout (`quip_kernels.e8p.pack`).
        columns: n.
        gather: how table entries are fetched, see `decode.look_up`; None chooses.

    Returns:
        float32 [P, M, m]: the result is the sum over the first dimension, the parts into which long rows were cut so that
        every multiprocessor has work. Who reads it next adds them up.

    Raises:
        ValueError: too many vectors, or shapes that do not belong together.
    """
    e8p.check(planes, columns)
    rows, words = planes.shape[1:]
    vectors, count = digits.sums.shape
    if not 1 <= vectors <= MOST_VECTORS:
        raise ValueError(f"{vectors} vectors, expected 1 to {MOST_VECTORS}")
    if tuple(digits.bytes.shape) != (vectors, count, 8, words):
        raise ValueError(f"digits of shape {list(digits.bytes.shape)} do not fit {columns} columns")
    choice = tile(vectors, count, arch())
    parts, blocks_per_part = split(rows, words, choice, processors(planes.device))
    result = torch.empty(parts, vectors, rows, dtype=torch.float32, device=planes.device)
    grid = (triton.cdiv(rows, choice.rows), parts, triton.cdiv(vectors, choice.vectors))
    with device_of(planes):
        matvec_kernel[grid](
            *digits,
            planes,
            e8p.table(planes.device),
            result,
            rows,
            vectors,
            words // e8p.WORDS_ALIGNMENT,
            blocks_per_part,
            VECTORS=choice.vectors,
            DIGITS=count,
            BLOCK_ROWS=choice.rows,
            BLOCK_WORDS=choice.words,
            EVEN=words % choice.words == 0,
            GATHER=not interpreted() if gather is None else gather,
            MERGE=choice.merge,
            ARCH=arch(),
            num_warps=4,
        )
    return result


class Tile(NamedTuple):
    """What one program of the kernel has: vectors, rows, words of a row at a time, and whether it merges accumulators."""

    vectors: int
    rows: int
    words: int
    merge: bool


def tile(vectors: int, digits: int, arch: str) -> Tile:
    """A tile whose accumulators fit into registers (checked for every target by the tests)."""
    vectors = min(vectors, 4)
    sets = vectors * digits
    return Tile(vectors, 32 if sets <= 4 else 16, 32, sets > 1 or arch == "hip")


def split(rows: int, words: int, tile: Tile, processors: int) -> tuple[int, int]:
    """How many parts the words are cut into, and the blocks of words in a part.

    Four programs for each multiprocessor hide the latency of memory; a part is not shorter than two blocks of words, as
    every part costs a partial result.
    """
    blocks = triton.cdiv(words, tile.words)
    wanted = triton.cdiv(4 * processors, triton.cdiv(rows, tile.rows))
    blocks_per_part = triton.cdiv(blocks, max(1, min(wanted, blocks // 2)))
    return triton.cdiv(blocks, blocks_per_part), blocks_per_part
