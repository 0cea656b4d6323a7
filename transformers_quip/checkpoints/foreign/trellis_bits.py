"""Trellis codes of QTIP and EXL3 files, re-packed into the native layout that `trellis.py` describes; and back into EXL3's.

Every function only moves bits, and returns its result on the device of its argument: int16 codes [m, n/16·K], if its name
begins with "from".
"""

from __future__ import annotations

import torch

from ...codebooks.trellis import TILE

# Of 3 bits, where the bytes of a square of four tiles come from, in order. Two groups of three are the smallest piece that
# is made of whole words; reversed they are a₂ a₁ a₀ b₂ b₁ b₀, of which memory has the second of each two first.
_SQUARE_OF_THREE_BITS = tuple(
    12 * (2 * pair + group) + 3 * (2 * column + row) + byte
    for row in range(2)
    for column in range(2)
    for pair in range(16)
    for group, byte in ((0, 1), (0, 2), (1, 2), (0, 0), (1, 0), (1, 1))
)
# 16·K of an EXL3 trellis: whole bits, and the half ones.
EXL3_WORDS = (*range(16, 129, 16), 24, 40, 56)
# Words that are handled at a time: with their temporaries they stay in a CPU's cache.
_PIECE = 1 << 15


def from_qtip(trellis: torch.Tensor, out_features: int, in_features: int) -> torch.Tensor:
    """QTIP's general layout, whose tiles are native ones already, of order "rows".

    Args:
        trellis: int16 [m·n/256, 16·K], tiles in row-major order.
        out_features, in_features: m and n, multiples of 16.

    Raises:
        ValueError: the shape or type is another.
    """
    k = _bits(trellis, out_features, in_features, TILE)
    return trellis.contiguous().view(out_features, in_features // TILE * k)


def from_qtip_kernel(trellis: torch.Tensor, out_features: int, in_features: int) -> torch.Tensor:
    """The layout of QTIP's kernels, used by every file of code HYB with Q = 9 and K = 2, 3 or 4; of order "qtip".

    Four tiles in a square share 128·K bytes: K bytes of each in turn, down the columns first, 32 times; the bytes of each
    such group are in reversed order.

    Args:
        trellis: int16 [m·n/256, 16·K].
        out_features, in_features: m and n, multiples of 32.

    Raises:
        ValueError: the shape or type is another, or K is not 2, 3 or 4.
    """
    k = _bits(trellis, out_features, in_features, 2 * TILE)
    if k not in (2, 3, 4):
        raise ValueError(f"QTIP's kernel layout is for 2, 3 or 4 bits, got {k}")
    squares = (out_features // 32, in_features // 32)
    if k == 3:
        # byte by byte in each square; then squares (M, N), row of the tiles → rows of tiles
        places = torch.tensor(_SQUARE_OF_THREE_BITS, device=trellis.device)
        square = trellis.contiguous().view(torch.uint8).view(-1, len(places))
        moved = square.gather(1, places.expand(len(square), -1)).view(torch.int16)
        return moved.view(*squares, 2, -1).transpose(1, 2).reshape(out_features, in_features // TILE * k)
    # reversing four bytes and exchanging each two again is exchanging two words; for two bytes nothing is left to do
    words = trellis.contiguous().view(*squares, 32, 2, 2, k // 2)
    words = words.flip(-1) if k == 4 else words
    # squares (M, N), group, column and row of the tile in its square → rows of tiles, tiles, words
    codes = words.permute(0, 4, 1, 3, 2, 5)
    return codes.reshape(out_features, in_features // TILE * k)


def from_exl3(trellis: torch.Tensor) -> torch.Tensor:
    """EXL3's layout; of order "exl3".

    Words of 32 bits, each written low half first; tiles in row-major order of (input, output); and windows that end where
    the bits of their step end, so that the first begins 16 − ⌊K⌋ bits before the ring's first bit.

    Args:
        trellis: int16 [n/16, m/16, 16·K].

    Raises:
        ValueError: the shape or type is another.
    """
    tiles_in, tiles_out, width = trellis.shape if trellis.dim() == 3 else (0, 0, 0)
    if trellis.dtype != torch.int16 or width not in EXL3_WORDS or (width % TILE and tiles_in % 2):
        raise ValueError(
            "an EXL3 trellis is int16 [n/16, m/16, 16·K] with K = 1 to 8, or K = 1.5, 2.5 or 3.5 and n a multiple of 32, "
            f"got {trellis.dtype} {list(trellis.shape)}"
        )
    k = width // TILE
    words = trellis.contiguous().view(torch.int32)
    codes = torch.empty(tiles_out, tiles_in, width // 2, dtype=torch.int32, device=trellis.device)
    together = max(1, _PIECE // (tiles_in * width))
    for first in range(0, tiles_out, together):
        # Each word is rotated right by 16 − k bits, then its halves are exchanged. Its low half then has the last 16 − k
        # bits of the word before and its own first k bits; its high half has its own bits from there on.
        words_here = words[:, first : first + together].transpose(0, 1).clone(memory_format=torch.contiguous_format)
        shifted = words_here << k
        low = words_here.bitwise_right_shift_(32 - k).bitwise_and_((1 << k) - 1)
        low[..., 1:] |= shifted[..., :-1]
        low[..., 0] |= shifted[..., -1]
        low.bitwise_and_(0xFFFF)
        torch.bitwise_or(low, shifted.bitwise_and_(-0x10000), out=codes[first : first + together])
    return codes.view(torch.int16).view(tiles_out * TILE, tiles_in * width // TILE)


def to_exl3(codes: torch.Tensor, in_features: int) -> torch.Tensor:
    """The inverse of [`from_exl3`].

    Args:
        codes: int16 [m, n/16·K] of a codebook of order "exl3".
        in_features: n.

    Returns:
        int16 [n/16, m/16, 16·K].

    Raises:
        ValueError: the shape or type is another.
    """
    rows, across = codes.shape if codes.dim() == 2 else (1, 0)
    tiles_in = in_features // TILE
    width, rest = divmod(across * TILE, tiles_in) if tiles_in else (0, 1)
    if codes.dtype != torch.int16 or rest or rows % TILE or in_features % TILE or width not in EXL3_WORDS:
        raise ValueError(
            f"codes of {in_features} columns must be int16 [m, n/16·K], m and n multiples of {TILE}, K as EXL3 has it, got "
            f"{codes.dtype} {list(codes.shape)}"
        )
    k = width // TILE
    # halves exchanged, the first bit of the ring is the highest of its words; then the ring is rotated left by 16 − k bits
    words = codes.contiguous().view(torch.int32).view(rows // TILE, tiles_in, width // 2)
    words = (words << 16) | ((words >> 16) & 0xFFFF)
    following = (words.roll(-1, -1) >> (16 + k)) & ((1 << (16 - k)) - 1)
    words = (words << (16 - k)) | following
    return words.transpose(0, 1).contiguous().view(torch.int16)


def _bits(trellis: torch.Tensor, out_features: int, in_features: int, multiple: int) -> int:
    """K of a trellis [m·n/256, 16·K]; raises `ValueError` for one that does not belong to a weight of this size."""
    tiles = out_features * in_features // TILE**2
    k, rest = divmod(trellis.shape[-1], TILE) if trellis.dim() == 2 else (0, 0)
    if trellis.dtype != torch.int16 or rest or not 1 <= k <= 8 or trellis.shape[0] != tiles:
        raise ValueError(
            f"the trellis of a [{out_features}, {in_features}] weight must be int16 with {tiles} tiles of 16·K words, "
            f"K = 1 to 8, got {trellis.dtype} {list(trellis.shape)}"
        )
    if out_features % multiple or in_features % multiple:
        raise ValueError(f"sizes must be multiples of {multiple}, got [{out_features}, {in_features}]")
    return k
