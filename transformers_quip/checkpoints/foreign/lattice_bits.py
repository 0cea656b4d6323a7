"""Lattice codes of other packages, re-packed bit by bit into native ones: nothing is decoded.

The layouts are facts about published checkpoints; each function says which. All of them work on the tensors' own device
with a few integer operations for each machine word, in pieces that fit into a cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

# Words that are permuted at a time: with their temporaries they stay in a CPU's cache.
_PIECE = 1 << 14
# Rows of a tile of QuIP#'s tensor-core order, columns of one, and its lanes.
TILE_ROWS, TILE_COLUMNS = 16, 64
# Bits of the low byte of an E8P code that hold the signs of coordinates 0 … 7, in QuIP-for-all and natively.
_SIGN_BITS, _NATIVE_SIGN_BITS = (7, 5, 6, 4, 3, 1, 2, 0), (0, 4, 1, 5, 2, 6, 3, 7)


def unpack_tiles(words: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """E8P codes out of QuIP#'s order for tensor cores.

    An int64 word is a cell of 2 rows × 16 columns, thus of four codes. Its low bytes are the pattern bytes of the
    codes (row 0, row 1, then the next 8 columns); bit 4j + i of its high half is bit j of the sign byte of code i.
    Cells lie in tiles of 16 rows × 64 columns: [rows/16, columns/64, 8 pairs of rows, 4 groups of columns].

    Args:
        words: int64, rows·columns/32 of them in any shape.
        rows, columns: of the weight; multiples of 16 and 64.

    Returns:
        int16 [rows, columns/8], the codes of codebook "e8p".

    Raises:
        ValueError: the sizes do not fit.
    """
    if rows % TILE_ROWS or columns % TILE_COLUMNS or words.dtype != torch.int64 or words.numel() * 32 != rows * columns:
        raise ValueError(
            f"{words.dtype} {list(words.shape)} are not the tiles of a weight [{rows}, {columns}], which would be "
            f"int64 [{rows}, {columns // 32}] with rows a multiple of {TILE_ROWS} and columns of {TILE_COLUMNS}"
        )
    words = words.reshape(rows, columns // 32)  # perhaps some columns of a larger matrix, not to be copied as a whole
    result = torch.empty(rows, columns // 8, dtype=torch.int16, device=words.device)
    together = TILE_ROWS * max(1, 32 * _PIECE // (TILE_ROWS * columns))
    for first in range(0, rows, together):
        part = words[first : first + together].reshape(-1)
        # [..., low half, high half] as integers of 32 bits; the machine's byte order is little-endian, as safetensors' is
        patterns, signs = part.view(torch.int32).view(-1, 2).unbind(1)
        codes = patterns.contiguous().view(torch.uint8).to(torch.int16).bitwise_left_shift_(8)
        codes.bitwise_or_(_permute_bits(signs, _TRANSPOSED).view(torch.uint8).to(torch.int16))
        # cell (tile row, tile column, pair, group, which 8 columns, which row) → (row, column)
        cells = codes.view(-1, columns // 64, 8, 4, 2, 2).permute(0, 2, 5, 1, 3, 4)
        result[first : first + together].view(cells.shape).copy_(cells)
    return result


# An 8×4 matrix of bits, transposed: bit 4j + i becomes bit 8i + j.
_TRANSPOSED = tuple(8 * (bit % 4) + bit // 4 for bit in range(32))


def _permute_bits(words: torch.Tensor, places: tuple[int, ...]) -> torch.Tensor:
    """int32 words whose bit b goes to places[b]."""
    low, high = (table.to(words.device) for table in _permuted(places))
    result = low.index_select(0, words & 0xFFFF)
    return result.bitwise_or_(high.index_select(0, (words >> 16).bitwise_and_(0xFFFF)))


@functools.cache
def _permuted(places: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """The results for all low halves and for all high halves of a word: int32 [65536]."""
    with torch.device("cpu"):  # models are built under torch.device("meta")
        halves = torch.arange(65536, dtype=torch.int64)
        low, high = torch.zeros_like(halves), torch.zeros_like(halves)
    for bit in range(16):
        value = halves >> bit & 1
        low |= value << places[bit]
        high |= value << places[16 + bit]
    return low.to(torch.int32), high.to(torch.int32)


def reorder_signs(codes: torch.Tensor) -> torch.Tensor:
    """E8P codes with QuIP-for-all's order of the sign bits, in the native order.

    There the signs of coordinates 0 … 7 are the bits 7, 5, 6, 4, 3, 1, 2, 0 of the low byte, natively the bits
    0, 4, 1, 5, 2, 6, 3, 7. In both the parity of the byte is the side of the shift, and changes bit 0 first.

    Args:
        codes: int16 of any shape.
    """
    table = _reordered().to(codes.device)
    return _piecewise(codes, lambda piece: table.index_select(0, piece.to(torch.int32) & 0xFFFF))


@functools.cache
def _reordered() -> torch.Tensor:
    """The native code of every code: int16 [65536]."""
    with torch.device("cpu"):  # models are built under torch.device("meta")
        codes = torch.arange(65536, dtype=torch.int32)
    parity = codes & 0xFF
    for shift in (4, 2, 1):
        parity = parity ^ (parity >> shift)
    parity = parity & 1
    signs = codes ^ parity
    result = (codes & 0xFF00) | parity
    for source, target in zip(_SIGN_BITS, _NATIVE_SIGN_BITS, strict=True):
        result = result ^ (((signs >> source) & 1) << target)
    return result.to(torch.int16)


def reorder_nibbles(words: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """Eight 4-bit codes in each word, in the native order: the first weight in the lowest bits.

    Args:
        words: int32 [m, w].
        order: which weight of the eight each nibble holds, from the lowest nibble on.

    Returns:
        uint8 [m, 4·w], the codes of codebook "half-integer".
    """

    places = tuple(4 * order[bit // 4] + bit % 4 for bit in range(32))
    reordered = _piecewise(words, lambda piece: _permute_bits(piece, places))
    return reordered.contiguous().view(torch.uint8).view(words.shape[0], -1)


def _piecewise(values: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The function of all values, in pieces that fit into a cache."""
    flat = values.reshape(-1)
    result = torch.empty_like(flat)
    for begin in range(0, flat.numel(), _PIECE):
        result[begin : begin + _PIECE] = function(flat[begin : begin + _PIECE])
    return result.view(values.shape)
