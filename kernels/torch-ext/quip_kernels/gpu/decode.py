"""Codes to nibbles and weights, for all kernels. The layouts of words are described in `..e8p` and `..e8`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_table(table_pointer, SIGNED: tl.constexpr, GATHER: tl.constexpr):
    """The table for `look_up`; 0 if `look_up` loads each entry by itself."""
    if GATHER:
        return tl.load(table_pointer + tl.arange(0, 512 if SIGNED else 256)).to(tl.uint32, bitcast=True)
    else:
        return 0


@triton.jit
def look_up(table_pointer, table, index, GATHER: tl.constexpr):
    """table[index] for a block of indices: by `tl.gather` from the table in registers and shared memory, or by loads."""
    if GATHER:
        size: tl.constexpr = index.numel
        return tl.reshape(tl.gather(table, tl.reshape(index.to(tl.int32), [size]), 0), index.shape)
    else:
        return tl.load(table_pointer + index.to(tl.int32)).to(tl.uint32, bitcast=True)


@triton.jit
def nibbles_of_words(table_pointer, table, indices, signs, SIGNED: tl.constexpr, GATHER: tl.constexpr):
    """The words of eight nibbles of the four codes in each word of the planes; nibble 2j + h stands for weight 4h + j.

    SIGNED: E8P, w = (2·nibble − 15) / 4; else E8, w = (2·nibble − 16) / 4, and signs is not read.
    """
    if SIGNED:
        i0, i1, i2 = indices & 0x1FF, (indices >> 9) & 0x1FF, (indices >> 18) & 0x1FF
        i3 = ((indices >> 27) | (signs << 5)) & 0x1FF
    else:
        i0, i1, i2, i3 = indices & 0xFF, (indices >> 8) & 0xFF, (indices >> 16) & 0xFF, indices >> 24
    if GATHER:
        # one gather for all, because each begins with a barrier
        stacked = look_up(table_pointer, table, tl.join(tl.join(i0, i2), tl.join(i1, i3)), GATHER)
        even, odd = tl.split(stacked)
        n0, n2 = tl.split(even)
        n1, n3 = tl.split(odd)
    else:
        n0 = look_up(table_pointer, table, i0, GATHER)
        n1 = look_up(table_pointer, table, i1, GATHER)
        n2 = look_up(table_pointer, table, i2, GATHER)
        n3 = look_up(table_pointer, table, i3, GATHER)
    if SIGNED:
        signs ^= (signs << 4) | (signs >> 28)
        high = signs >> 2
        n0 ^= (signs & 0x11111111) * 14
        n1 ^= (signs & 0x22222222) * 7
        n2 ^= (high & 0x11111111) * 14
        n3 ^= (high & 0x22222222) * 7
    return n0, n1, n2, n3


@triton.jit
def nibbles_of_codes(table_pointer, table, codes, SIGNED: tl.constexpr, GATHER: tl.constexpr):
    """The words of eight nibbles of stored codes: int16 if SIGNED (`e8p.table_of_stored`), else uint8 (`e8.table`)."""
    if SIGNED:
        index = codes.to(tl.int32)
        if GATHER:
            # one gather for both, because each begins with a barrier
            pattern, flips = tl.split(
                look_up(table_pointer, table, tl.join((index >> 8) & 0xFF, (index & 0xFF) + 256), GATHER)
            )
        else:
            pattern = look_up(table_pointer, table, (index >> 8) & 0xFF, GATHER)
            flips = look_up(table_pointer, table, (index & 0xFF) + 256, GATHER)
        return pattern ^ flips
    else:
        return look_up(table_pointer, table, codes.to(tl.int32), GATHER)


@triton.jit
def _twice_weight(nibbles, k: tl.constexpr, SIGNED: tl.constexpr):
    """2w of nibble k as float16: the nibble is put into the bits of a number 64 … 79, without a conversion."""
    bits = nibbles << 4 if k == 0 else nibbles >> (4 * k - 4)
    return ((bits & 0xF0) | 0x5400).to(tl.uint16).to(tl.float16, bitcast=True) - (71.5 if SIGNED else 72.0)


@triton.jit
def _twice_weights_of_code(nibbles, SIGNED: tl.constexpr):
    """2w of the eight weights of a code: float16 [R, W, 8], in their order."""
    # Nibble 2j + h is weight 4h + j. Joining adds a last dimension: the innermost join becomes the slowest index.
    even = tl.join(
        tl.join(_twice_weight(nibbles, 0, SIGNED), _twice_weight(nibbles, 1, SIGNED)),
        tl.join(_twice_weight(nibbles, 4, SIGNED), _twice_weight(nibbles, 5, SIGNED)),
    )
    odd = tl.join(
        tl.join(_twice_weight(nibbles, 2, SIGNED), _twice_weight(nibbles, 3, SIGNED)),
        tl.join(_twice_weight(nibbles, 6, SIGNED), _twice_weight(nibbles, 7, SIGNED)),
    )
    return tl.reshape(tl.join(even, odd), [nibbles.shape[0], nibbles.shape[1], 8])


@triton.jit
def twice_weights_of_codes(nibbles, SIGNED: tl.constexpr):
    """2w of all weights of codes [R, C]: float16 [R, 8 C], exact, from the words of `nibbles_of_codes`."""
    return tl.reshape(_twice_weights_of_code(nibbles, SIGNED), [nibbles.shape[0], nibbles.shape[1] * 8])


@triton.jit
def twice_weights_of_words(n0, n1, n2, n3, SIGNED: tl.constexpr):
    """2w of all weights of words [R, W]: float16 [R, 32 W], exact, from the words of `nibbles_of_words`."""
    first = tl.join(_twice_weights_of_code(n0, SIGNED), _twice_weights_of_code(n2, SIGNED))
    second = tl.join(_twice_weights_of_code(n1, SIGNED), _twice_weights_of_code(n3, SIGNED))
    # [R, W, weight, code / 2, code % 2] → [R, W, code, weight]
    both = tl.permute(tl.join(first, second), [0, 1, 3, 4, 2])
    return tl.reshape(both, [n0.shape[0], n0.shape[1] * 32])
