"""Transforms in blocks: a Hadamard transform on each block of neighbouring numbers.

"hadamard-N" has blocks of N numbers, which must divide the size. A part of the numbers that is made of whole blocks has the
same transform, under the same name. So a linear with such a transform can be cut among devices, each of which transforms
its own part. EXL3 has blocks of 128, and of 256 in its tables.

"hadamard-eighths" has 8 blocks, whatever the size (QTIP, for 8 devices).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

from .transform import LARGEST_DENSE, Transform, hadamard, in_blocks

EIGHTHS = "hadamard-eighths"
_NAME = re.compile(r"hadamard-([1-9][0-9]{0,5})")
# No linear has more inputs or outputs between its transforms.
_LARGEST = 1 << 18


def block_size(name: object) -> int | None:
    """N of "hadamard-N"; None for any other name, and for an N with a prime factor above 256."""
    match = _NAME.fullmatch(name) if isinstance(name, str) else None
    size = int(match[1]) if match else 0
    return size if 2 <= size <= _LARGEST and _is_product(size) else None


@functools.lru_cache(maxsize=1024)
def _is_product(size: int) -> bool:
    """Whether the Hadamard transform of this size is a product of matrices: no prime factor is larger than they may be."""
    for factor in range(2, LARGEST_DENSE + 1):
        while size % factor == 0:
            size //= factor
    return size == 1


def multiple_of(name: str) -> int:
    """The number of which a size must be a multiple, so that there is a transform of this name; 1: any size."""
    return 8 if name == EIGHTHS else block_size(name) or 1


def blocks_of(name: str, size: int) -> int | None:
    """The numbers in a block of the transform of this name and size; None for a transform that mixes all numbers."""
    return size // 8 if name == EIGHTHS else block_size(name)


@functools.lru_cache(maxsize=256)
def block_transform(block: int) -> Callable[[int, int], Transform]:
    """The transform with blocks of this many numbers: (size, seed) → [`Transform`]."""

    def build(size: int, seed: int) -> Transform:
        _check_multiple(f"hadamard-{block}", size, block, f"blocks of {block} numbers")
        return in_blocks(hadamard(block, seed), size // block)

    return build


def hadamard_eighths(size: int, seed: int) -> Transform:
    """The Hadamard transform on each of 8 blocks. Raises `ValueError` for other sizes."""
    _check_multiple(EIGHTHS, size, 8, "8 blocks")
    return in_blocks(hadamard(size // 8, seed), 8)


def _check_multiple(name: str, size: int, factor: int, parts: str) -> None:
    if size < 1 or size % factor:
        raise ValueError(f"{name} works on {parts}, size={size} is not a multiple of {factor}: choose 'hadamard'")
