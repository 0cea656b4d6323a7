"""Weights from codes, for prefill: written once and multiplied by a library's GEMM."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import e8p, layout
from .decode import nibbles_of_words, twice_weights_of_words
from .launch import device_of


@triton.jit
def _twice_weights(planes, table, place, plane_stride, inside, SIGNED: tl.constexpr):
    """2w of the words at place: float16 [R, 32 W]."""
    indices = tl.load(planes + place, mask=inside, other=0).to(tl.uint32, bitcast=True)
    signs = 0
    if SIGNED:
        signs = tl.load(planes + plane_stride + place, mask=inside, other=0).to(tl.uint32, bitcast=True)
    n0, n1, n2, n3 = nibbles_of_words(table, 0, indices, signs, SIGNED, False)
    return twice_weights_of_words(n0, n1, n2, n3, SIGNED)


@triton.jit
def dequantize_kernel(
    planes,
    table,
    residual,
    residual_table,
    residual_scale,
    weight,
    rows,
    quads,
    columns,
    SIGNED: tl.constexpr,
    RESIDUAL_SIGNED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    """weight [rows, columns] of one stage, or of two if residual is not None; BLOCK_ROWS × BLOCK_WORDS words a program."""
    row = (tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]
    word = (tl.program_id(0) * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS))[None, :]
    inside = (row < rows) & (word < quads * 4)
    place = row * (quads * 4) + word
    plane_stride = tl.cast(rows, tl.int64) * (quads * 4)
    value = _twice_weights(planes, table, place, plane_stride, inside, SIGNED).to(tl.float32)
    if residual is not None:
        second = _twice_weights(residual, residual_table, place, plane_stride, inside, RESIDUAL_SIGNED)
        value += second.to(tl.float32) * residual_scale
    column = (tl.program_id(0) * BLOCK_WORDS * 32 + tl.arange(0, BLOCK_WORDS * 32))[None, :]
    value = (value * 0.5).to(weight.dtype.element_ty)
    tl.store(weight + row * columns + column, value, mask=(row < rows) & (column < columns))


def dequantize(
    planes: torch.Tensor,
    columns: int,
    dtype: torch.dtype,
    residual: torch.Tensor | None = None,
    residual_scale: float = 1.0,
) -> torch.Tensor:
    """The decoded weight of codes in kernel layout.

    Args:
        planes: of the first stage; residual: of the second or None (`quip_kernels.layout`).
        columns: n, without completing codes.
        dtype: float16, bfloat16 or float32; one stage is exact in each, two are added in float32 and rounded once.
        residual_scale: factor of the second stage.

    Returns:
        Ŵ [m, columns], contiguous.

    Raises:
        ValueError: the planes do not fit this many columns.
    """
    first, *second = layout.stages(planes, columns, residual, residual_scale)
    rows, words = planes.shape[1:]
    weight = torch.empty(rows, columns, dtype=dtype, device=planes.device)
    if weight.numel():
        grid = (triton.cdiv(words, 8), triton.cdiv(rows, 16))
        with device_of(planes):
            dequantize_kernel[grid](
                first.planes,
                first.table,
                second[0].planes if second else None,
                second[0].table if second else None,
                residual_scale,
                weight,
                rows,
                words // e8p.WORDS_ALIGNMENT,
                columns,
                SIGNED=first.signed,
                RESIDUAL_SIGNED=bool(second) and second[0].signed,
                BLOCK_ROWS=16,
                BLOCK_WORDS=8,
                num_warps=4,
            )
    return weight
