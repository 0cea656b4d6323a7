"""The weights of trellis states on GPUs: computed, or looked up in a table. See `transformers_quip.codebooks.trellis`."""

from __future__ import annotations

import triton
import triton.language as tl

from .dot import dot_bytes


@triton.jit
def _byte_sum(h, ARCH: tl.constexpr):
    """The sum of the four bytes of words, as float32."""
    if ARCH == "cuda":
        ones = tl.full(h.shape, 0x01010101, tl.int32)
        total = dot_bytes(h.to(tl.int32, bitcast=True), ones, tl.zeros(h.shape, tl.int32), ARCH)
    else:
        pairs = (h & 0x00FF00FF) + ((h >> 8) & 0x00FF00FF)
        total = ((pairs + (pairs >> 16)) & 0xFFFF).to(tl.int32, bitcast=True)
    return total.to(tl.float32)


@triton.jit
def _half(bits):
    return bits.to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def _sum_of_halves(h):
    h = (h & 0x8FFF8FFF) ^ 0x3B603B60
    return (_half(h >> 16) + _half(h & 0xFFFF)).to(tl.float32)


@triton.jit
def computed(s, CODE: tl.constexpr, ARCH: tl.constexpr):
    """The weight of states s (uint32) in a code without a table: float32; of 1mad and 2mad 147.800537109375 times it."""
    if CODE == "3inst":
        return _sum_of_halves(s * 89226354 + 64248484)
    elif CODE == "mcg":
        return _sum_of_halves(s * 0xCBAC1FED)
    elif CODE == "mul1":
        # product and sum are exact in float32: one rounding
        value = (_byte_sum(s * 0x83DCD12D, ARCH) + 1024.0) * 0.00676727294921875 - 10.3828125
        return value.to(tl.float16).to(tl.float32)
    elif CODE == "2mad":
        h = s * 264435761 + 1013904223
        h += tl.umulhi(h, tl.full(h.shape, 1664525, tl.uint32))
        return _byte_sum(h, ARCH) - 510.0
    else:
        return _byte_sum(s * 34038481 + 76625530, ARCH) - 510.0


@triton.jit
def _row_of_table(s, CODE: tl.constexpr, TABLE_BITS: tl.constexpr):
    """For states s (uint32) in a code with a table: the row, and bit 15 set if its first value is to be negated."""
    h = s if CODE == "lut" else s * (s + 1)
    if CODE == "hyb":
        return (h >> (15 - TABLE_BITS)) & ((1 << TABLE_BITS) - 1), h & 0x8000
    else:
        return (h >> (16 - TABLE_BITS)) & ((1 << TABLE_BITS) - 1), h & 0


@triton.jit
def tabulated(table, s, CODE: tl.constexpr, TABLE_BITS: tl.constexpr, STEP: tl.constexpr, HALVES: tl.constexpr):
    """The weights of states s in a code with a table, a tuple of STEP blocks of float32.

    HALVES: the table has pairs of float16, each in one word; else table[row * STEP + i] is a number of any type.
    """
    row, negative = _row_of_table(s, CODE, TABLE_BITS)
    row = row.to(tl.int32, bitcast=True)
    if HALVES:
        word = tl.load(table + row).to(tl.uint32, bitcast=True) ^ negative
        return _half(word & 0xFFFF).to(tl.float32), _half(word >> 16).to(tl.float32)
    else:
        first = tl.load(table + row * STEP).to(tl.float32)
        first = tl.where(negative != 0, -first, first)
        if STEP == 1:
            return (first,)
        else:
            return first, tl.load(table + row * STEP + 1).to(tl.float32)
