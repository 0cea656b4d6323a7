"""Transforms in blocks: a Hadamard transform on each block of neighbouring numbers.

"hadamard-N" has blocks of N numbers, which must divide the size. "hadamard/N" has N blocks, whatever the size. A part of
the numbers that is made of whole blocks has the same transform. So a linear with such a transform can be cut among devices,
each of which transforms its own part. EXL3 has blocks of 128, and of 256 in its tables.

"hadamard-eighths" is an older name of "hadamard/8", for models of QTIP.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

from .transform import LARGEST_DENSE, Transform, hadamard, in_blocks

EIGHTHS = "hadamard-eighths"
_SIZE = re.compile(r"hadamard-([1-9][0-9]{0,5})")
_COUNT = re.compile(r"hadamard/([1-9][0-9]{0,3})")
# No linear has more inputs or outputs between its transforms.
_LARGEST = 1 << 18
# More blocks than devices that could share a layer.
_MOST = 1024


def block_size(name: object) -> int | None:
    """N of "hadamard-N"; None for any other name, and for an N with a prime factor above 256."""
    match = _SIZE.fullmatch(name) if isinstance(name, str) else None
    size = int(match[1]) if match else 0
    return size if 2 <= size <= _LARGEST and _is_product(size) else None


def block_count(name: object) -> int | None:
    """N of "hadamard/N", 8 for "hadamard-eighths"; None for any other name, and for an N above 1024."""
    if name == EIGHTHS:
        return 8
    match = _COUNT.fullmatch(name) if isinstance(name, str) else None
    count = int(match[1]) if match else 0
    return count if 2 <= count <= _MOST else None


@functools.lru_cache(maxsize=1024)
def _is_product(size: int) -> bool:
    """Whether the Hadamard transform of this size is a product of matrices: no prime factor is larger than they may be."""
    for factor in range(2, LARGEST_DENSE + 1):
        while size % factor == 0:
            size //= factor
    return size == 1


def multiple_of(name: str) -> int:
    """The number of which a size must be a multiple, so that there is a transform of this name; 1: any size."""
    return block_count(name) or block_size(name) or 1


def blocks_of(name: str, size: int) -> int | None:
    """The numbers in a block of the transform of this name and size; None for a transform that mixes all numbers."""
    count = block_count(name)
    return size // count if count else block_size(name)


def has_blocks(name: object) -> bool:
    """Whether this is the name of a transform in blocks."""
    return block_count(name) is not None or block_size(name) is not None


@functools.lru_cache(maxsize=256)
def block_transform(name: str) -> Callable[[int, int], Transform]:
    """The transform in blocks of this name: (size, seed) → [`Transform`]; it raises `ValueError` for other sizes."""
    factor, count = multiple_of(name), block_count(name)

    def build(size: int, seed: int) -> Transform:
        if size < 1 or size % factor:
            parts = f"{factor} blocks" if count else f"blocks of {factor} numbers"
            raise ValueError(f"{name} works on {parts}, size={size} is not a multiple of {factor}: choose 'hadamard'")
        number = count or size // factor
        return in_blocks(hadamard(size // number, seed), number)

    return build
