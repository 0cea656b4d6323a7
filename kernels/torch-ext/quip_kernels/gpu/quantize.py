"""Activations as integers of several 8-bit digits, for kernels whose inner loop multiplies bytes.

A row x becomes q = round(x / scale), |q| ≤ limit, scale = max|x| / limit, in balanced digits to the base 256:
q = d₀ + 256 d₁ + …, each d in −128 … 127. One digit is the usual int8 quantization; two are fixed point with 16 bits, whose
error is below the rounding of x to float16 or bfloat16; three hold 24 bits, like a float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .. import e8p
from .launch import device_of


class Digits(NamedTuple):
    """Quantized rows in the order in which the kernels read them.

    Attributes:
        bytes: int32 [M, D, 8, words]: bytes b of [m, d, g, w] is digit d of x[m, 32w + 4g + b].
        sums: int32 [M, D]: Σ of a row's digits.
        scales: float32 [M].
    """

    bytes: torch.Tensor
    sums: torch.Tensor
    scales: torch.Tensor

    @classmethod
    def empty(cls, rows: int, columns: int, digits: int, device: torch.device) -> Digits:
        """Empty memory for `rows` vectors of `columns` numbers. Raises `ValueError` unless digits is 1, 2 or 3."""
        if digits not in (1, 2, 3):
            raise ValueError(f"digits={digits} must be 1, 2 or 3")
        words = e8p.words(columns)
        # The rest of the last word must be zero; the kernels do not write it.
        make = torch.empty if words * e8p.WEIGHTS_PER_WORD == columns else torch.zeros
        return cls(
            make(rows, digits, 8, words, dtype=torch.int32, device=device),
            torch.empty(rows, digits, dtype=torch.int32, device=device),
            torch.empty(rows, dtype=torch.float32, device=device),
        )


@triton.jit
def largest_integer(DIGITS: tl.constexpr):
    """The limit of |q|: Σ 127·256^d, so that the top digit fits; less with three digits, because x/scale is rounded too."""
    return 127.0 if DIGITS == 1 else (32639.0 if DIGITS == 2 else 8355000.0)


@triton.jit
def scale_of(largest, poison, DIGITS: tl.constexpr):
    """scale and 1/scale for max|x| = largest; poison is 0, or NaN if x is not finite, which makes the scale NaN too."""
    limit = largest_integer(DIGITS)
    scale = largest / limit + poison
    return scale, tl.where(largest > 0, limit / largest, 0.0)


@triton.jit
def round_to_integer(x, inverse):
    return tl.floor(x * inverse + 0.5).to(tl.int32)


@triton.jit
def lowest_digit(q):
    return ((q + 128) & 0xFF) - 128


@triton.jit
def quantize_kernel(x, digits, sums, scales, columns, words, DIGITS: tl.constexpr, BLOCK: tl.constexpr):
    """One row of x [M, columns] float32 a program; BLOCK groups of four neighbours at a time."""
    row = tl.program_id(0)
    x += row.to(tl.int64) * columns
    digits += row.to(tl.int64) * DIGITS * 8 * words
    most = tl.zeros([BLOCK * 4], tl.float32)
    poison = tl.zeros([BLOCK * 4], tl.float32)
    for start in range(0, columns, BLOCK * 4):
        column = start + tl.arange(0, BLOCK * 4)
        value = tl.load(x + column, mask=column < columns, other=0.0)
        most = tl.maximum(most, tl.abs(value))
        poison += value * 0.0
    scale, inverse = scale_of(tl.max(most, 0), tl.sum(poison, 0), DIGITS)
    tl.store(scales + row, scale)
    totals = (tl.zeros([BLOCK], tl.int32),) * DIGITS
    for start in range(0, columns, BLOCK * 4):
        group = start // 4 + tl.arange(0, BLOCK)
        integers = ()
        for b in tl.static_range(4):
            column = group * 4 + b
            value = tl.load(x + column, mask=column < columns, other=0.0)
            integers = integers + (round_to_integer(value, inverse),)
        new_totals = ()
        for d in tl.static_range(DIGITS):
            packed = tl.zeros([BLOCK], tl.int32)
            total = totals[d]
            rest = ()
            for b in tl.static_range(4):
                digit = lowest_digit(integers[b])
                total += digit
                packed |= (digit & 0xFF) << (8 * b)
                rest = rest + ((integers[b] - digit) >> 8,)
            integers = rest
            new_totals = new_totals + (total,)
            tl.store(digits + (d * 8 + group % 8) * words + group // 8, packed, mask=group < words * 8)
        totals = new_totals
    for d in tl.static_range(DIGITS):
        tl.store(sums + row * DIGITS + d, tl.sum(totals[d], 0))


def quantize(x: torch.Tensor, digits: int) -> Digits:
    """The digits of every row of x [M, n] float32, contiguous. Raises `ValueError` unless digits is 1, 2 or 3."""
    rows, columns = x.shape
    result = Digits.empty(rows, columns, digits, x.device)
    block = min(1024, triton.next_power_of_2(triton.cdiv(columns, 4)))
    with device_of(x):
        quantize_kernel[(rows,)](
            x, *result, columns, e8p.words(columns), DIGITS=digits, BLOCK=block, num_warps=8 if block > 256 else 4
        )
    return result
