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
    # [..., low half, high half] as integers of 32 bits; the machine's byte order is little-endian, as safetensors' is
    halves = words.reshape(-1).contiguous().view(torch.int32).view(-1, 2)
    codes = torch.empty(halves.shape[0], 4, 2, dtype=torch.uint8, device=words.device)
    for begin in range(0, halves.shape[0], _PIECE):
        piece = halves[begin : begin + _PIECE]
        codes[begin : begin + _PIECE, :, 0] = _transpose_signs(piece[:, 1].clone()).view(torch.uint8).view(-1, 4)
        codes[begin : begin + _PIECE, :, 1] = piece[:, 0].contiguous().view(torch.uint8).view(-1, 4)
    # cell (tile row, tile column, pair, group, which 8 columns, which row) → (row, column)
    cells = codes.view(torch.int16).view(rows // 16, columns // 64, 8, 4, 2, 2)
    return cells.permute(0, 2, 5, 1, 3, 4).reshape(rows, columns // 8)


def _transpose_signs(words: torch.Tensor) -> torch.Tensor:
    """Bit 4j + i → bit 8i + j of int32 words, in place: an 8×4 matrix of bits, transposed.

    As an index of five bits, (j₂ j₁ j₀ i₁ i₀) → (i₁ i₀ j₂ j₁ j₀), made of exchanges of two index bits; an exchange of
    bits a > b swaps all bits whose index has a = 1, b = 0 with those 2^a − 2^b above.
    """
    moved = torch.empty_like(words)
    for shift, mask in _EXCHANGES:
        torch.bitwise_right_shift(words, shift, out=moved)
        moved.bitwise_xor_(words).bitwise_and_(mask)
        words.bitwise_xor_(moved).bitwise_xor_(moved.bitwise_left_shift_(shift))
    return words


def _exchange(high: int, low: int) -> tuple[int, int]:
    """Distance and mask of the exchange of two bits of the index of a 32-bit word."""
    mask = sum(1 << index for index in range(32) if not index >> high & 1 and index >> low & 1)
    return (1 << high) - (1 << low), mask - (1 << 32) if mask >> 31 else mask


def _exchanges(order: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Exchanges after which index bit k is what was index bit order[k]."""
    now, steps = list(range(5)), []
    for place, wanted in enumerate(order):
        there = now.index(wanted)
        if there != place:
            now[there], now[place] = now[place], now[there]
            steps.append(_exchange(there, place))
    return tuple(steps)


# the new index is (i₁ i₀ j₂ j₁ j₀): from its lowest bit on, what were the bits 2, 3, 4, 0, 1
_EXCHANGES = _exchanges((2, 3, 4, 0, 1))


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

    def reorder(piece: torch.Tensor) -> torch.Tensor:
        # nibbles that go equally far go together
        result, moved = torch.zeros_like(piece), torch.empty_like(piece)
        for distance, mask in moves.items():
            torch.bitwise_and(piece, mask, out=moved)
            if distance < 0:
                moved.bitwise_right_shift_(-4 * distance).bitwise_and_((1 << (32 + 4 * distance)) - 1)
            else:
                moved.bitwise_left_shift_(4 * distance)
            result |= moved
        return result

    moves: dict[int, int] = {}
    for nibble, weight in enumerate(order):
        moves[weight - nibble] = moves.get(weight - nibble, 0) | 0xF << 4 * nibble
    moves = {distance: mask - (mask >> 31 << 32) for distance, mask in moves.items()}

    return _piecewise(words, reorder).contiguous().view(torch.uint8).view(words.shape[0], -1)


def _piecewise(values: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The function of all values, in pieces that fit into a cache."""
    flat = values.reshape(-1)
    result = torch.empty_like(flat)
    for begin in range(0, flat.numel(), _PIECE):
        result[begin : begin + _PIECE] = function(flat[begin : begin + _PIECE])
    return result.view(values.shape)
