"""From two words of codes to nibbles and weights, as all E8P kernels need it. The layout is described in `..e8p`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def signs_of_words(signs):
    """Of words of the signs plane: the signs as they are meant, and the parity of each code in its place of all nibbles."""
    parity = signs ^ ((signs << 4) | (signs >> 28))
    parity = parity ^ ((parity << 8) | (parity >> 24))
    parity = parity ^ ((parity << 16) | (parity >> 16))
    return signs ^ (parity & 0xF), parity


@triton.jit
def look_up(table_pointer, table, index, GATHER: tl.constexpr):
    """table[index] for a block of indices: by `tl.gather` from the table in registers and shared memory, or by loads."""
    if GATHER:
        size: tl.constexpr = index.numel
        return tl.reshape(tl.gather(table, tl.reshape(index.to(tl.int32), [size]), 0), index.shape)
    else:
        return tl.load(table_pointer + index.to(tl.int32)).to(tl.uint32, bitcast=True)


@triton.jit
def nibbles_of_words(table_pointer, table, indices, signs, GATHER: tl.constexpr):
    """The words of eight nibbles of the four codes in each word of the planes.

    Nibble 2j + h stands for weight 4h + j, w = (2·nibble − 15) / 4. A table entry is XORed with 14 where the nibble's
    sign is negative and with 1 where the code's parity is odd.
    """
    i0, i1, i2, i3 = indices & 0xFF, (indices >> 8) & 0xFF, (indices >> 16) & 0xFF, indices >> 24
    if GATHER:
        # one gather for all: each begins with a barrier
        stacked = look_up(table_pointer, table, tl.join(tl.join(i0, i2), tl.join(i1, i3)), GATHER)
        even, odd = tl.split(stacked)
        n0, n2 = tl.split(even)
        n1, n3 = tl.split(odd)
    else:
        n0 = look_up(table_pointer, table, i0, GATHER)
        n1 = look_up(table_pointer, table, i1, GATHER)
        n2 = look_up(table_pointer, table, i2, GATHER)
        n3 = look_up(table_pointer, table, i3, GATHER)
    signs, parity = signs_of_words(signs)
    high = signs >> 2
    n0 ^= (signs & 0x11111111) * 14 + (parity & 0x11111111)
    n1 ^= (signs & 0x22222222) * 7 + ((parity >> 1) & 0x11111111)
    n2 ^= (high & 0x11111111) * 14 + ((parity >> 2) & 0x11111111)
    n3 ^= (high & 0x22222222) * 7 + ((parity >> 3) & 0x11111111)
    return n0, n1, n2, n3


@triton.jit
def weight_of_nibble(nibbles, k: tl.constexpr, dtype: tl.constexpr):
    """w = nibble/2 − 15/4 of nibble k of each word: exact in every floating dtype."""
    nibble = ((nibbles >> (4 * k)) & 0xF).to(tl.int32, bitcast=True)
    return (nibble.to(tl.float32) * 0.5 - 3.75).to(dtype)


@triton.jit
def _twice_weight(nibbles, k: tl.constexpr):
    """2w = nibble − 7.5 of nibble k as float16; it becomes the units of 64 … 79, so that no conversion is needed."""
    bits = nibbles << 4 if k == 0 else nibbles >> (4 * k - 4)
    return ((bits & 0xF0) | 0x5400).to(tl.uint16).to(tl.float16, bitcast=True) - 71.5


@triton.jit
def _twice_weights_of_code(nibbles):
    """2w of the eight weights of a code: float16 with a new last dimension of 8, in their order."""
    # Nibble 2j + h is weight 4h + j. Joining adds a last dimension: the innermost join becomes the slowest index.
    even = tl.join(
        tl.join(_twice_weight(nibbles, 0), _twice_weight(nibbles, 1)),
        tl.join(_twice_weight(nibbles, 4), _twice_weight(nibbles, 5)),
    )
    odd = tl.join(
        tl.join(_twice_weight(nibbles, 2), _twice_weight(nibbles, 3)),
        tl.join(_twice_weight(nibbles, 6), _twice_weight(nibbles, 7)),
    )
    return tl.reshape(tl.join(even, odd), [nibbles.shape[0], nibbles.shape[1], 8])


@triton.jit
def twice_weights_of_words(n0, n1, n2, n3):
    """2w of all weights of words [R, W]: float16 [R, 32 W], from the four nibble words of `nibbles_of_words`."""
    first = tl.join(_twice_weights_of_code(n0), _twice_weights_of_code(n2))
    second = tl.join(_twice_weights_of_code(n1), _twice_weights_of_code(n3))
    # [R, W, weight, code / 2, code % 2] → [R, W, code, weight]
    both = tl.permute(tl.join(first, second), [0, 1, 3, 4, 2])
    return tl.reshape(both, [n0.shape[0], n0.shape[1] * 32])
