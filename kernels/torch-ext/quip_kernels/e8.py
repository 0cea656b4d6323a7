"""The kernel layout of E8 codes, the second stage of 3-bit layers, and the table that kernels decode them with.

A logical code (uint8; QuIP#, arXiv 2402.04396) names 8 neighbouring weights, a vector of the lattice E8 of squared norm at
most 2, or one of 15 of squared norm 4. The weights are multiples of 1/2, and the table holds a code's eight as nibbles:

    w = (nibble − 8) / 2        nibble in 4 … 12

in the order of `e8p`. In the kernel layout byte i of an int32 word is code i of four: the codes themselves, in one plane
whose rows are completed like the rows of E8P.
"""

from __future__ import annotations

import functools
import itertools

import torch

from .e8p import CODES_PER_WORD, WEIGHT_OF_NIBBLE, row_parts, words


@functools.cache
def _table() -> torch.Tensor:
    # 2w: integers first, then half-integers, each in lexicographic order and with an even sum; then ±2 along an axis
    whole = [v for v in itertools.product((-2, 0, 2), repeat=8) if sum(map(abs, v)) in (0, 4)]
    halves = [v for v in itertools.product((-1, 1), repeat=8) if sum(v) % 4 == 0]
    axes = [tuple(side * (i == axis) for i in range(8)) for side in (4, -4) for axis in range(8)][:-1]
    nibbles = [sum(row[weight] + 8 << 4 * k for k, weight in enumerate(WEIGHT_OF_NIBBLE)) for row in whole + halves + axes]
    return torch.tensor(nibbles, dtype=torch.int64).to(torch.int32)


@functools.lru_cache(maxsize=16)
def table(device: torch.device) -> torch.Tensor:
    """The nibbles of every code: int32 [256] on `device`; cached."""
    return _table().to(device)


def pack(codes: torch.Tensor) -> torch.Tensor:
    """The kernel layout of a grid of codes.

    Args:
        codes: uint8 [m, c], on any device.

    Returns:
        int32 [1, m, words], `words` = ⌈c / 16⌉ · 4, contiguous, on the same device.

    Raises:
        TypeError: codes are not uint8. ValueError: they are not a matrix.
    """
    if codes.dtype != torch.uint8:
        raise TypeError(f"codes of E8 are uint8, got {codes.dtype}")
    if codes.ndim != 2:
        raise ValueError(f"codes must be [m, c], got {list(codes.shape)}")
    rows, count = codes.shape
    width = words(count * 8)
    planes = torch.zeros(1, rows, width, dtype=torch.int32, device=codes.device)
    # byte by byte: the layout fixes the order of bytes in a word, whatever the machine's byte order is
    for part in row_parts(rows):
        for i in range(CODES_PER_WORD):
            column = codes[part, i::CODES_PER_WORD].to(torch.int32)
            planes[0, part, : column.shape[1]] |= column.bitwise_left_shift_(8 * i)
    return planes


def unpack(planes: torch.Tensor, columns: int) -> torch.Tensor:
    """The codes of a kernel layout: the inverse of [`pack`].

    Args:
        planes: int32 [1, m, words].
        columns: weights in a row, by which the completing codes at the end are dropped.

    Returns:
        uint8 [m, ⌈columns / 8⌉].

    Raises:
        ValueError: the plane does not fit rows of this many weights.
    """
    check(planes, columns)
    codes = torch.stack([(planes[0] >> (8 * i)) & 0xFF for i in range(CODES_PER_WORD)], dim=2)
    return codes.to(torch.uint8).flatten(1)[:, : -(-columns // 8)].contiguous()


def check(planes: torch.Tensor, columns: int) -> None:
    """Raise `ValueError` unless this is the plane of a matrix with this many columns."""
    if planes.dtype != torch.int32 or planes.ndim != 3 or planes.shape[0] != 1 or planes.shape[2] != words(columns):
        raise ValueError(
            f"the kernel layout of {columns} columns of E8 codes is int32 [1, m, {words(columns)}], "
            f"got {planes.dtype} {list(planes.shape)}"
        )
