"""The numbers of bits that a config may ask for."""

from __future__ import annotations

from .. import codebooks

# The bits of single modules where `bits` is an average that no codebook has.
MIXED_BITS = (2, 3, 4)


def known_bits() -> list[float]:
    """The bits that some codebook has, ascending."""
    return sorted({codebooks.get(name).bits for name in codebooks.names()})
