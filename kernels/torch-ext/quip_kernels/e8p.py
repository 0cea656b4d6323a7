"""The kernel layout of E8P codes, and the table that kernels decode them with.

A logical code (int16; QuIP#, arXiv 2402.04396, section 4.2) names 8 neighbouring weights: its high byte one of 256
patterns, its low byte eight sign bits whose parity p gives the side of the shift and flips bit 0. The weights are
multiples of 1/4,

    w = (2·nibble − 15) / 4        nibble in 2 … 13,

and the kernels work on the 32-bit word of the eight nibbles of a code:

    nibbles = table[pattern + 256·p] XOR 14·signs        (signs: one bit for each nibble; an even number of them are set)

In the kernel layout 4 codes of a row (32 weights) share a word in each of two int32 planes, so that a thread loads 128 bits
of either at once. Kernels are limited by the number of instructions, so the bits are arranged for few of them:

    indices   bits 9i … 9i + 8 = the index of code i (pattern + 256·p); of code 3, the lower 5 bits
    signs     bits 0 … 3 = the upper 4 bits of the index of code 3
              bit 4k + i = bit 4(k − 1) + i XOR the sign of nibble k of code i        k = 1 … 7

so that signs XOR (signs rotated by 4 to the left) has the sign of every nibble; also of nibble 0, because an even number
of signs are set.

Nibble 2j + h of a code is its weight 4h + j: the nibbles at even places are the first four weights, so that four
consecutive 8-bit activations face four bytes of masked nibbles. Bit 0, which the parity flips, belongs to nibble 0. The
planes hold the same bits as the codes, in another order; [`unpack`] is the exact inverse of [`pack`].
"""

from __future__ import annotations

import functools
import itertools

import torch

CODES_PER_WORD = 4
WEIGHTS_PER_WORD = 32
# Rows are completed to this many words with codes 0 (which meet activations 0): 128-bit loads stay aligned.
WORDS_ALIGNMENT = 4

# Coordinates that are 1/2 (the other five are 3/2) in the last 29 patterns, of squared norm 12.
_NORM_TWELVE = (
    "123 023 013 012 367 357 347 356 346 345 267 257 247 256 246 245 167 157 147 156 146 045 067 057 047 056 046 014 237"
)
# Bit of the low byte of a code that holds the sign of weight 0..7.
_SIGN_BITS = (0, 4, 1, 5, 2, 6, 3, 7)
# Weight that nibble 0..7 holds.
WEIGHT_OF_NIBBLE = tuple(4 * (k % 2) + k // 2 for k in range(8))


@functools.cache
def _table() -> torch.Tensor:
    rows = [v for v in itertools.product((0, 1, 2), repeat=8) if sum((a + 0.5) ** 2 for a in v) <= 10]
    rows += [tuple(0 if str(i) in halves else 1 for i in range(8)) for halves in _NORM_TWELVE.split()]
    words = []
    for row in rows:
        # |w| = a + 1/2; the last coordinate is negative where the sum is odd: −1 − a is a with its sign flipped
        steps = [*row[:7], row[7] if sum(row) % 2 == 0 else -1 - row[7]]
        # 4w = 4·step + 2 ± 1 and nibble = (4w + 15) / 2, lower side of the shift if bit 0 is 0
        nibbles = [2 * (steps[weight] + 4) + 1 for weight in WEIGHT_OF_NIBBLE]
        words.append(sum(nibble << 4 * k for k, nibble in enumerate(nibbles)))
    # p = 1 is the lower side
    return torch.tensor(words + [word ^ 0x11111111 for word in words], dtype=torch.int64).to(torch.int32)


@functools.lru_cache(maxsize=16)
def table(device: torch.device) -> torch.Tensor:
    """The nibbles of every pattern, all signs as in the pattern, for p = 0 and then p = 1: int32 [512]; cached."""
    return _table().to(device)


@functools.lru_cache(maxsize=16)
def table_of_stored(device: torch.device) -> torch.Tensor:
    """Two tables for codes as they are stored: nibbles = table[high byte] XOR table[256 + low byte]. int32 [512]; cached.

    The second part has 14 in every nibble whose sign the low byte changes, and 1 in every nibble where its parity is odd.
    """
    low = torch.arange(256)
    bits = [(low >> bit) & 1 for bit in _SIGN_BITS]
    parity = functools.reduce(torch.bitwise_xor, bits)
    bits[0] = bits[0] ^ parity  # an even number of signs changes
    flips = parity * 0x11111111
    for nibble, weight in enumerate(WEIGHT_OF_NIBBLE):
        flips ^= (bits[weight] * 14) << (4 * nibble)
    return torch.cat([_table()[:256], flips.to(torch.int32)]).to(device)


def words(columns: int) -> int:
    """Words of a plane's row for this many weights."""
    return -(-columns // (WEIGHTS_PER_WORD * WORDS_ALIGNMENT)) * WORDS_ALIGNMENT


def row_parts(rows: int) -> list[slice]:
    """The rows of a matrix in parts that are packed one after the other.

    Copies of all codes as 32-bit numbers would take several times the memory of the codes. Those of a sixteenth take a
    fraction of it, and parts of 64 rows are large enough for a GPU.
    """
    together = min(max(rows // 16, 64), 1024)
    return [slice(first, first + together) for first in range(0, rows, together)]


def pack(codes: torch.Tensor) -> torch.Tensor:
    """The kernel layout of a grid of codes.

    Args:
        codes: int16 [m, c], on any device.

    Returns:
        int32 [2, m, words], `words` = ⌈c / 16⌉ · 4: the planes of indices and of signs, contiguous, on the same device.

    Raises:
        TypeError: codes are not int16. ValueError: they are not a matrix.
    """
    if codes.dtype != torch.int16:
        raise TypeError(f"codes of E8P are int16, got {codes.dtype}")
    if codes.ndim != 2:
        raise ValueError(f"codes must be [m, c], got {list(codes.shape)}")
    rows, count = codes.shape
    width = words(count * 8)
    planes = torch.zeros(2, rows, width, dtype=torch.int32, device=codes.device)
    for some in row_parts(rows):
        part = (
            torch.nn.functional.pad(codes[some], (0, width * CODES_PER_WORD - count)).to(torch.int32).bitwise_and_(0xFFFF)
        )
        part = part.view(len(part), width, CODES_PER_WORD)
        indices, signs = planes[0, some], planes[1, some]
        for i in range(CODES_PER_WORD):
            code = part[..., i]
            parity = code & 0xFF
            for half in (4, 2, 1):
                parity ^= parity >> half
            index = parity.bitwise_and_(1).bitwise_left_shift_(8).bitwise_or_(code >> 8)
            indices |= index << (9 * i)  # of the last index, the upper bits fall out
        for k in range(WEIGHTS_PER_WORD // CODES_PER_WORD):
            for i in range(CODES_PER_WORD):
                if k == 0:
                    bit = (index >> (5 + i)) & 1
                else:
                    bit = (signs >> (4 * (k - 1) + i)) ^ (part[..., i] >> _SIGN_BITS[WEIGHT_OF_NIBBLE[k]])
                signs |= (bit & 1) << (4 * k + i)
    return planes


def unpack(planes: torch.Tensor, columns: int) -> torch.Tensor:
    """The codes of a kernel layout: the inverse of [`pack`].

    Args:
        planes: int32 [2, m, words].
        columns: weights in a row, by which the completing codes at the end are dropped.

    Returns:
        int16 [m, ⌈columns / 8⌉].

    Raises:
        ValueError: the planes do not fit rows of this many weights.
    """
    check(planes, columns)
    rows, width = planes.shape[1:]
    codes = torch.empty(rows, width, CODES_PER_WORD, dtype=torch.int16, device=planes.device)
    for some in row_parts(rows):
        indices, signs = planes[:, some]
        flips = signs ^ ((signs << 4) | ((signs >> 28) & 0xF))
        for i in range(CODES_PER_WORD):
            index = indices >> (9 * i)
            if i == CODES_PER_WORD - 1:
                index = (index & 0x1F) | (signs << 5)
            code = (index & 0xFF) << 8 ^ (index >> 8) & 1  # the parity flips bit 0
            for k, weight in enumerate(WEIGHT_OF_NIBBLE):
                code ^= ((flips >> (4 * k + i)) & 1) << _SIGN_BITS[weight]
            codes[some, :, i] = code.to(torch.int16)
    return codes.flatten(1)[:, : -(-columns // 8)].contiguous()


def check(planes: torch.Tensor, columns: int) -> None:
    """Raise `ValueError` unless these are the planes of a matrix with this many columns."""
    if planes.dtype != torch.int32 or planes.ndim != 3 or planes.shape[0] != 2 or planes.shape[2] != words(columns):
        raise ValueError(
            f"the kernel layout of {columns} columns is int32 [2, m, {words(columns)}], "
            f"got {planes.dtype} {list(planes.shape)}"
        )
