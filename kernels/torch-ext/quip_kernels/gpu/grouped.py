"""Vectors times the codes of their own experts, on tensor cores: only experts that have vectors are decoded.

The vectors are sorted by expert. A tile is a few of one expert; each program finds by itself which tile it has, so the host
reads nothing, and a graph that holds the launch is right for any choice of experts. Codes are read in the form in which
checkpoints store them, because stacked parameters are sharded, saved and loaded in that form.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .. import e8, e8p
from . import tune
from .decode import load_table, nibbles_of_codes, twice_weights_of_codes
from .launch import device_of, family, interpreted, processors
from .small_batch import Halves, Tile

# Columns of activations are completed to a multiple of this.
ALIGNMENT = 128
BLOCK_ROWS = 64
BLOCK_CODES = ALIGNMENT // 8
MOST_EXPERTS = 4096
_TABLES = {torch.int16: e8p.table_of_stored, torch.uint8: e8.table}


@triton.jit
def _find_tile(ends, number, vectors, experts, EXPERTS: tl.constexpr, BLOCK_VECTORS: tl.constexpr):
    """Expert, first vector and end of the expert's vectors of a tile; `experts` is the group of vectors without one.

    A number beyond the last tile gives an empty range.
    """
    e = tl.arange(0, EXPERTS)
    end = tl.load(ends + e, mask=e < experts, other=vectors).to(tl.int32)
    begin = tl.load(ends + e - 1, mask=(e > 0) & (e <= experts), other=0).to(tl.int32)
    begin = tl.where(e > experts, vectors, begin)
    tiles = (end - begin + BLOCK_VECTORS - 1) // BLOCK_VECTORS
    after = tl.cumsum(tiles, 0)
    own = (after - tiles <= number) & (number < after)
    first = tl.sum(tl.where(own, begin + (number - after + tiles) * BLOCK_VECTORS, 0), 0)
    return tl.sum(tl.where(own, e, 0), 0), first, tl.sum(tl.where(own, end, 0), 0)


@triton.jit
def grouped_kernel(
    values,
    scales,
    ends,
    codes,
    table,
    parts,
    vectors,
    experts,
    rows,
    columns,
    blocks_per_part,
    factor,
    SIGNED: tl.constexpr,
    TERMS: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_VECTORS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CODES: tl.constexpr,
    GATHER: tl.constexpr,
):
    """parts [P, vectors, rows] of factor · scale · Ŵ_e x, e the expert of the vector; 0 for vectors without one.

    Program (r, t, p) has BLOCK_ROWS rows, the t-th tile of vectors and the p-th part of a row's `columns` codes.
    """
    blocks = tl.cdiv(columns, BLOCK_CODES)
    width = blocks * (BLOCK_CODES * 8)  # of an activation
    expert, first, end = _find_tile(ends, tl.program_id(1), vectors, experts, EXPERTS, BLOCK_VECTORS)
    if first < end:
        part = tl.program_id(2)
        row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        vector = first + tl.arange(0, BLOCK_VECTORS)
        source = tl.minimum(vector, end - 1)
        own = codes + tl.cast(tl.minimum(expert, experts - 1), tl.int64) * rows * columns
        start_of_row = (tl.minimum(row, rows - 1) * columns)[:, None]
        table_values = load_table(table, SIGNED, GATHER)
        total = tl.zeros([BLOCK_ROWS, BLOCK_VECTORS], tl.float32)
        until = tl.minimum((part + 1) * blocks_per_part, blocks)
        for block in range(part * blocks_per_part, tl.where(expert < experts, until, 0)):
            place = (block * BLOCK_CODES + tl.arange(0, BLOCK_CODES))[None, :]
            code = tl.load(own + start_of_row + place, mask=place < columns, other=0)
            nibbles = nibbles_of_codes(table, table_values, code, SIGNED, GATHER)
            weights = twice_weights_of_codes(nibbles, SIGNED)
            column = (block * BLOCK_CODES * 8 + tl.arange(0, BLOCK_CODES * 8))[:, None]
            for term in tl.static_range(TERMS):
                x = tl.load(values + (tl.cast(term, tl.int64) * vectors + source[None, :]) * width + column)
                total = tl.dot(weights, x, total)
        scale = tl.load(scales + source) * (0.5 * factor)
        total = tl.where(expert < experts, total * scale[None, :], 0.0)
        place = (tl.cast(part, tl.int64) * vectors + vector)[None, :] * rows + row[:, None]
        tl.store(parts + place, total, mask=(vector < end)[None, :] & (row < rows)[:, None])


def grouped(
    x: Halves,
    ends: torch.Tensor,
    codes: torch.Tensor,
    residual: torch.Tensor | None = None,
    residual_scale: float = 1.0,
    gather: bool | None = None,
) -> torch.Tensor:
    """Ŵ_e x for vectors that are sorted by expert e.

    Args:
        x: from `small_batch.halves`, with columns completed to a multiple of `ALIGNMENT`.
        ends: int64 or int32 [E], not decreasing: vectors from ends[e−1] to ends[e] belong to expert e.
        codes: as stored, of all experts: int16 [E, m, c] (E8P); residual: of the second stage, int16 (E8P) or uint8 (E8)
            [E, m, c], or None.
        residual_scale: factor of the second stage.
        gather: how table entries are fetched, see `decode.look_up`; None chooses.

    Returns:
        float32 [P, M, m]: the result is the sum over the first dimension; zeros from ends[−1] on.

    Raises:
        TypeError: codes of another dtype. ValueError: shapes that do not belong together.
    """
    stages = [Stage(codes, 1.0), *([] if residual is None else [Stage(residual, residual_scale)])]
    _check(x, ends, stages)
    vectors, (experts, rows, columns) = x.values.shape[1], codes.shape
    block = block_vectors(vectors, experts)
    tiles_of_vectors = most_tiles(vectors, experts, block)
    parts = split(rows, columns, tiles_of_vectors, processors(codes.device))
    result = torch.empty(len(stages) * parts, vectors, rows, dtype=torch.float32, device=codes.device)
    for stage, out in zip(stages, result.split(parts), strict=True):
        candidates = [tile for tile in tiles(block, family(codes.device)) if gather in (None, tile.gather)]
        name = f"grouped {'e8p' if stage.signed else 'e8'} {block}x{len(x.values)}"
        run = functools.partial(_launch, x, ends, stage, parts=out)
        tune.run_fastest(name, (tiles_of_vectors, rows, columns), candidates, codes.device, run)
    return result


class Stage(NamedTuple):
    """One stage of the experts' weights: its stored codes [E, m, c], and their factor."""

    codes: torch.Tensor
    factor: float

    @property
    def signed(self) -> bool:
        """Whether the codes are E8P, not E8."""
        return self.codes.dtype == torch.int16


def _check(x: Halves, ends: torch.Tensor, stages: Sequence[Stage]) -> None:
    shape = stages[0].codes.shape
    for stage in stages:
        if stage.codes.dtype not in _TABLES:
            raise TypeError(f"codes of experts are int16 (E8P) or uint8 (E8), got {stage.codes.dtype}")
        if stage.codes.ndim != 3 or stage.codes.shape != shape or not stage.codes.is_contiguous():
            raise ValueError(f"codes must be contiguous and [experts, m, c], got {list(stage.codes.shape)}")
    if not 1 <= shape[0] < MOST_EXPERTS or tuple(ends.shape) != shape[:1]:
        raise ValueError(f"{list(ends.shape)} ends do not fit {shape[0]} experts (1 to {MOST_EXPERTS - 1})")
    if ends.is_floating_point() or not ends.is_contiguous():
        raise ValueError(f"ends must be contiguous integers, got {ends.dtype}")
    width = triton.cdiv(shape[2] * 8, ALIGNMENT) * ALIGNMENT
    if x.values.shape[1] < 1 or x.values.shape[2] != width:
        raise ValueError(f"activations {list(x.values.shape)} do not fit {shape[2]} codes a row: [terms, vectors, {width}]")


def _launch(x: Halves, ends: torch.Tensor, stage: Stage, tile: Tile, parts: torch.Tensor) -> None:
    experts, rows, columns = stage.codes.shape
    terms, vectors, _ = x.values.shape
    block = block_vectors(vectors, experts)
    grid = (triton.cdiv(rows, BLOCK_ROWS), most_tiles(vectors, experts, block), parts.shape[0])
    with device_of(parts):
        grouped_kernel[grid](
            *x,
            ends,
            stage.codes,
            _TABLES[stage.codes.dtype](stage.codes.device),
            parts,
            vectors,
            experts,
            rows,
            columns,
            triton.cdiv(triton.cdiv(columns, BLOCK_CODES), parts.shape[0]),
            stage.factor,
            SIGNED=stage.signed,
            TERMS=terms,
            EXPERTS=triton.next_power_of_2(experts + 1),
            BLOCK_VECTORS=block,
            BLOCK_ROWS=BLOCK_ROWS,
            BLOCK_CODES=BLOCK_CODES,
            GATHER=tile.gather,
            num_warps=tile.warps,
            **({} if tile.stages is None else {"num_stages": tile.stages}),
        )


def tiles(block: int, family: str) -> list[Tile]:
    """The tiles to choose from, the first without measuring; none spills more than 8 bytes on it (`launch.family`)."""
    usual = Tile(gather=not interpreted(), warps=4)
    if family == "rdna":
        usual = usual._replace(warps=4 if block == 16 else 16)
    if family == "blackwell":  # Triton 3.6 does not compile loads of single table entries for it
        return [usual, usual._replace(warps=8)]
    other = usual._replace(gather=not usual.gather, stages=1 if family == "rdna" else None)
    return [usual, other] if family == "rdna" else [usual, usual._replace(warps=8), other]


def block_vectors(vectors: int, experts: int) -> int:
    """Vectors of a tile, a size of tensor cores: the codes of an expert are decoded once for each of its tiles."""
    return min(64, max(16, triton.next_power_of_2(triton.cdiv(vectors, experts))))


def most_tiles(vectors: int, experts: int, block: int) -> int:
    """The largest number of tiles that vectors can have: each expert (and the rest) may begin one that is not full."""
    return min(vectors, vectors // block + experts + 1)


def split(rows: int, columns: int, tiles_of_vectors: int, processors: int) -> int:
    """Parts that the codes of a row are cut into: two programs a multiprocessor, at least four blocks in each part."""
    blocks = triton.cdiv(columns, BLOCK_CODES)
    wanted = triton.cdiv(2 * processors, triton.cdiv(rows, BLOCK_ROWS) * tiles_of_vectors)
    return triton.cdiv(blocks, triton.cdiv(blocks, max(1, min(wanted, blocks // 4))))
