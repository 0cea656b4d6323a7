"""Sizes of the tiles of Sylvester's transform, and the number of warps that compute one."""

from __future__ import annotations

# Sylvester factors in one pass: a larger tile does not fit into the registers of a program.
LARGEST_BLOCK = 4096


def tile(power: int) -> tuple[int, int]:
    """Rows and columns of a tile for blocks of `power` neighbours; products need at least 16 of either."""
    if power <= 64:
        return 16, max(16, power)
    b = 1 << (power.bit_length() // 2)
    return max(16, power // b), b


def warps(numbers: int, family: str) -> int:
    """Warps for a tile of this many numbers on a family of devices (`launch.family`): no register may be spilled."""
    if numbers < 2048:
        return 4
    return 16 if numbers == LARGEST_BLOCK and family == "rdna" else 8


def is_fused(power: int, family: str) -> bool:
    """Whether a transform by Sylvester's matrix is quantized in the same kernel.

    Triton 3.6 does not compile the larger ones of those for Blackwell, and RDNA has too few registers for them.
    """
    return 256 <= power <= LARGEST_BLOCK and family not in ("blackwell", "rdna")
