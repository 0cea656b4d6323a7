"""Weights from codes, for prefill: written once and multiplied by a library's GEMM."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import e8p
from .decode import look_up, signs_of_words, weight_of_nibble
from .launch import device_of


@triton.jit
def dequantize_kernel(
    planes,
    table,
    weight,
    rows,
    words,
    columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CODES: tl.constexpr,
):
    """weight [rows, columns] of planes [2, rows, words]; a program has BLOCK_ROWS × BLOCK_CODES codes."""
    row = (tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]
    code = (tl.program_id(0) * BLOCK_CODES + tl.arange(0, BLOCK_CODES))[None, :]
    inside = (row < rows) & (code < words * 4)
    place = row * words + code // 4
    indices = tl.load(planes + place, mask=inside, other=0).to(tl.uint32, bitcast=True)
    signs = tl.load(planes + tl.cast(rows, tl.int64) * words + place, mask=inside, other=0).to(tl.uint32, bitcast=True)
    signs, parity = signs_of_words(signs)
    i = (code % 4).to(tl.uint32)
    nibbles = look_up(table, 0, (indices >> (8 * i)) & 0xFF, False)
    nibbles = nibbles ^ (((signs >> i) & 0x11111111) * 14 + ((parity >> i) & 0x11111111))
    # Nibble 2j + h is weight 4h + j. Joining adds a last dimension: the innermost join becomes the slowest index.
    dtype: tl.constexpr = weight.dtype.element_ty
    even = tl.join(
        tl.join(weight_of_nibble(nibbles, 0, dtype), weight_of_nibble(nibbles, 1, dtype)),
        tl.join(weight_of_nibble(nibbles, 4, dtype), weight_of_nibble(nibbles, 5, dtype)),
    )
    odd = tl.join(
        tl.join(weight_of_nibble(nibbles, 2, dtype), weight_of_nibble(nibbles, 3, dtype)),
        tl.join(weight_of_nibble(nibbles, 6, dtype), weight_of_nibble(nibbles, 7, dtype)),
    )
    values = tl.reshape(tl.join(even, odd), [BLOCK_ROWS, BLOCK_CODES * 8])
    column = (tl.program_id(0) * BLOCK_CODES * 8 + tl.arange(0, BLOCK_CODES * 8))[None, :]
    tl.store(weight + row * columns + column, values, mask=(row < rows) & (column < columns))


def dequantize(planes: torch.Tensor, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """The weight that codes in kernel layout stand for.

    Args:
        planes: int32 [2, m, words] (`quip_kernels.e8p.pack`).
        columns: n, the real columns.
        dtype: float16, bfloat16 or float32; exact in each.

    Returns:
        Ŵ [m, columns], contiguous.

    Raises:
        ValueError: the planes are not those of so many columns.
    """
    e8p.check(planes, columns)
    rows, words = planes.shape[1:]
    weight = torch.empty(rows, columns, dtype=dtype, device=planes.device)
    if weight.numel():
        grid = (triton.cdiv(words * e8p.CODES_PER_WORD, 32), triton.cdiv(rows, 16))
        with device_of(planes):
            dequantize_kernel[grid](
                planes, e8p.table(planes.device), weight, rows, words, columns, BLOCK_ROWS=16, BLOCK_CODES=32, num_warps=4
            )
    return weight
