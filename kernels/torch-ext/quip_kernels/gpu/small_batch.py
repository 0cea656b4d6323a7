"""A small batch times codes on tensor cores: the weights of a tile are decoded to float16 and never leave the chip.

Activations are float16 with one scale for each row; if float16 is not enough, a second float16 holds the remainder.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .. import e8p, layout
from . import tune
from .decode import load_table, nibbles_of_words, twice_weights_of_words
from .launch import device_of, family, interpreted, processors

LARGEST_BATCH = 64
BLOCK_ROWS = 64
BLOCK_WORDS = e8p.WORDS_ALIGNMENT


class Halves(NamedTuple):
    """Rows of float32 as float16: x = scale · (values[0] + values[1] + …).

    Attributes:
        values: float16 [T, M, 32·words], |values[0]| ≤ 1, zero beyond the columns.
        scales: float32 [M].
    """

    values: torch.Tensor
    scales: torch.Tensor


@triton.jit
def halves_kernel(x, values, scales, columns, width, limit, term_stride, TERMS: tl.constexpr, BLOCK: tl.constexpr):
    """One row of x [M, columns] float32 a program → values [TERMS, M, width] with max|values[0]| = limit."""
    row = tl.program_id(0)
    x += row.to(tl.int64) * columns
    values += row.to(tl.int64) * width
    most = tl.zeros([BLOCK], tl.float32)
    poison = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(x + column, mask=column < columns, other=0.0)
        most = tl.maximum(most, tl.abs(value))
        poison += value * 0.0
    largest = tl.max(most, 0)
    inverse = tl.where(largest > 0, limit / largest, 0.0)
    # a maximum ignores NaN; a row with NaN or infinity becomes NaN
    tl.store(scales + row, largest / limit + tl.sum(poison, 0))
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        rest = tl.load(x + column, mask=column < columns, other=0.0) * inverse
        for term in tl.static_range(TERMS):
            half = rest.to(tl.float16)
            rest -= half.to(tl.float32)
            tl.store(values + term * term_stride + column, half, mask=column < width)


def halves(x: torch.Tensor, terms: int, limit: float = 1.0, width: int | None = None) -> Halves:
    """x [M, n] float32, contiguous, as `terms` float16 numbers each, none above `limit`; see [`Halves`].

    `width` ≥ n: columns of the result; None: n completed to whole words of codes.
    """
    rows, columns = x.shape
    width = e8p.words(columns) * e8p.WEIGHTS_PER_WORD if width is None else width
    values = torch.empty(terms, rows, width, dtype=torch.float16, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    block = min(2048, triton.next_power_of_2(width))
    with device_of(x):
        halves_kernel[(rows,)](
            x, values, scales, columns, width, limit, rows * width, TERMS=terms, BLOCK=block, num_warps=4
        )
    return Halves(values, scales)


@triton.jit
def small_batch_kernel(
    values,
    scales,
    planes,
    table,
    parts,
    batch,
    rows,
    quads,
    blocks_per_part,
    factor,
    SIGNED: tl.constexpr,
    TERMS: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    GATHER: tl.constexpr,
):
    """parts [P, batch, rows] of factor · scale · Ŵ x: program (r, p) has BLOCK_ROWS rows and the p-th part of the words."""
    words = quads * 4
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    part = tl.program_id(1)
    vector = tl.arange(0, BLOCK_BATCH)
    start_of_row = (tl.minimum(row, rows - 1) * words)[:, None]
    signs_plane = planes + tl.cast(rows, tl.int64) * words
    table_values = load_table(table, SIGNED, GATHER)
    total = tl.zeros([BLOCK_ROWS, BLOCK_BATCH], tl.float32)
    for block in range(part * blocks_per_part, tl.minimum((part + 1) * blocks_per_part, tl.cdiv(words, BLOCK_WORDS))):
        word = (block * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS))[None, :]
        # rows are a multiple of BLOCK_WORDS long
        indices = tl.load(planes + start_of_row + word).to(tl.uint32, bitcast=True)
        signs = 0
        if SIGNED:
            signs = tl.load(signs_plane + start_of_row + word).to(tl.uint32, bitcast=True)
        n0, n1, n2, n3 = nibbles_of_words(table, table_values, indices, signs, SIGNED, GATHER)
        weights = twice_weights_of_words(n0, n1, n2, n3, SIGNED)
        column = block * BLOCK_WORDS * 32 + tl.arange(0, BLOCK_WORDS * 32)
        for term in tl.static_range(TERMS):
            source = values + ((term * batch + tl.minimum(vector, batch - 1)) * (words * 32))[None, :] + column[:, None]
            total = tl.dot(weights, tl.load(source), total)
    scale = tl.load(scales + tl.minimum(vector, batch - 1)) * (0.5 * factor)
    place = (part * batch + vector)[None, :] * rows + row[:, None]
    tl.store(parts + place, total * scale[None, :], mask=(vector < batch)[None, :] & (row < rows)[:, None])


def small_batch(
    x: Halves,
    planes: torch.Tensor,
    columns: int,
    residual: torch.Tensor | None = None,
    residual_scale: float = 1.0,
    gather: bool | None = None,
) -> torch.Tensor:
    """Ŵ x for a batch of vectors.

    Args:
        x: from [`halves`], at most `LARGEST_BATCH` rows, as wide as whole words of codes.
        planes: codes of the first stage; residual: of the second or None (`quip_kernels.layout`).
        columns: n.
        residual_scale: factor of the second stage.
        gather: how table entries are fetched, see `decode.look_up`; None chooses.

    Returns:
        float32 [P, M, m]: the result is the sum over the first dimension.

    Raises:
        ValueError: a larger batch, or shapes that do not belong together.
    """
    stages = layout.stages(planes, columns, residual, residual_scale)
    rows, words = planes.shape[1:]
    _, batch, width = x.values.shape
    if not 1 <= batch <= LARGEST_BATCH:
        raise ValueError(f"a batch of {batch}, expected 1 to {LARGEST_BATCH}")
    if width != words * e8p.WEIGHTS_PER_WORD:
        raise ValueError(f"activations of width {width} do not fit {columns} columns")
    parts = split(rows, words, processors(planes.device))
    result = torch.empty(len(stages) * parts, batch, rows, dtype=torch.float32, device=planes.device)
    for stage, out in zip(stages, result.split(parts), strict=True):
        candidates = [tile for tile in tiles(batch, family(planes.device)) if gather in (None, tile.gather)]
        name = f"small batch {'e8p' if stage.signed else 'e8'} {block_batch(batch)}x{len(x.values)}"
        run = functools.partial(_launch, x, stage, parts=out)
        tune.run_fastest(name, (rows, words), candidates, planes.device, run)
    return result


def _launch(x: Halves, stage: layout.Stage, tile: Tile, parts: torch.Tensor) -> None:
    _, rows, words = stage.planes.shape
    terms, batch, _ = x.values.shape
    with device_of(parts):
        small_batch_kernel[(triton.cdiv(rows, BLOCK_ROWS), parts.shape[0])](
            *x,
            stage.planes,
            stage.table,
            parts,
            batch,
            rows,
            words // e8p.WORDS_ALIGNMENT,
            triton.cdiv(words // BLOCK_WORDS, parts.shape[0]),
            stage.factor,
            SIGNED=stage.signed,
            TERMS=terms,
            BLOCK_BATCH=block_batch(batch),
            BLOCK_ROWS=BLOCK_ROWS,
            BLOCK_WORDS=BLOCK_WORDS,
            GATHER=tile.gather,
            num_warps=tile.warps,
            **({} if tile.stages is None else {"num_stages": tile.stages}),
        )


class Tile(NamedTuple):
    """The work of one program of the kernel.

    Attributes:
        gather: see `decode.look_up`. warps: of a program.
        stages: blocks that are loaded in advance; None: Triton's own choice.
    """

    gather: bool
    warps: int
    stages: int | None = None


def tiles(batch: int, family: str) -> list[Tile]:
    """The tiles to choose from, the first without measuring; none spills registers on this family (`launch.family`)."""
    usual = Tile(gather=not interpreted(), warps=4)
    if family == "rdna":
        usual = usual._replace(warps=4 if block_batch(batch) == 16 else 16)
    # if table entries are loaded one by one, no registers are left for the next block's activations
    other = usual._replace(gather=not usual.gather, stages=1 if family in ("blackwell", "rdna") else None)
    return [usual, other] if family == "rdna" else [usual, usual._replace(warps=8), other]


def block_batch(batch: int) -> int:
    """Vectors of a tile: tensor cores take at least 16."""
    return max(16, triton.next_power_of_2(batch))


def split(rows: int, words: int, processors: int) -> int:
    """Parts that the words are cut into: two programs a multiprocessor, at least four blocks of words in each part."""
    blocks = words // BLOCK_WORDS
    wanted = triton.cdiv(2 * processors, triton.cdiv(rows, BLOCK_ROWS))
    return triton.cdiv(blocks, triton.cdiv(blocks, max(1, min(wanted, blocks // 4))))
