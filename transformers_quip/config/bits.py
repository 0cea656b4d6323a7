"""The numbers of bits that a config may ask for."""

from __future__ import annotations

from .. import codebooks

# The bits of single modules where `bits` is an average that no codebook has.
MIXED_BITS = (2, 3, 4)


def mixed_bits(bits: float, family: str | None) -> tuple[int, ...]:
    """The bits that modules may get for an average: whole ones around it, and 1 only for an average below 2."""
    if family is None:
        return MIXED_BITS
    whole = [int(number) for number in codebooks.bits_of(family) if number == int(number)]
    above = next(index for index, number in enumerate(whole) if number > bits)
    return tuple(number for number in whole[max(above - 2, 0) : above + 2] if number > 1 or bits < 2)


def averages(family: str | None) -> tuple[float, float]:
    """The least and the largest average that codebooks of this family can have, or by default."""
    known = MIXED_BITS if family is None else codebooks.bits_of(family)
    return known[0], known[-1]


def is_average(bits: float, family: str | None) -> bool:
    """Whether no codebook has these bits, of this family or by default, but some have fewer and others more."""
    lowest, highest = averages(family)
    return bits not in codebooks.bits_of(family) and lowest < bits < highest
