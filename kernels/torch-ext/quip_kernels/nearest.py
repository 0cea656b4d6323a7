"""Tables for the search of the nearest E8P point: every candidate that a reflected vector has to be compared with.

For a side of the shift, z = x ∓ 1/4 and y = |z|. A point of that side is a pattern v with signs. An even sum of v asks for
an even number of negative signs, an odd sum for an odd one. Where z has such a number, its own signs are best. Where it has
not, one sign has to change, and the smallest y is the best place, except in the 29 patterns whose permutations are not all
in the codebook: there a change at each of the three coordinates 1/2 is tried, too. So a candidate is a vector c with the
score ⟨f, c⟩ − |c|²/2, where f is y, or y with its smallest coordinate negated:

    group 0     patterns of an even sum; f is negated where z has an odd number of negative coordinates
    group 1     patterns of an odd sum; f is negated where that number is even
    group 2     of the 29 patterns (their sums are odd) a coordinate 1/2 negated; f = y; only where that number is even
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from . import e8, e8p

# Candidates are compared this many at a time, and each group is completed to a multiple of it.
TOGETHER = 64
# Added to the score of candidates that only complete a group.
_NEVER = -1e30


class Candidates(NamedTuple):
    """The candidates of all groups, one after the other.

    Attributes:
        vectors: float32 [C / TOGETHER, 8, TOGETHER]: c, of a few candidates coordinate by coordinate.
        biases: float32 [C]: −|c|²/2.
        about: int32 [C]: the pattern, and 256 · (1 + the coordinate that is negated), 0 for none.
        ends: where each group ends.
    """

    vectors: torch.Tensor
    biases: torch.Tensor
    about: torch.Tensor
    ends: tuple[int, int, int]


@functools.cache
def magnitudes() -> torch.Tensor:
    """The 256 patterns v in the order of their codes: float32 [256, 8]."""
    words = e8p.table_of_stored(torch.device("cpu"))[:256]
    nibbles = torch.stack([(words >> (4 * e8p.WEIGHT_OF_NIBBLE.index(w))) & 0xF for w in range(8)], 1)
    # the first half of a table, p = 0, is the upper side of the shift
    return ((2 * nibbles - 15).float() / 4 - 0.25).abs()


@functools.cache
def _candidates() -> Candidates:
    patterns = magnitudes()
    odd = patterns.sum(1) % 2 == 1
    groups: list[list[tuple[torch.Tensor, int]]] = [[], [], []]
    for number, pattern in enumerate(patterns):
        groups[int(odd[number])].append((pattern, number))
        if pattern.square().sum() == 12:
            for coordinate in (pattern == 0.5).nonzero().flatten().tolist():
                changed = pattern.clone()
                changed[coordinate] *= -1
                groups[2].append((changed, number | (1 + coordinate) << 8))
    vectors, biases, about, ends = [], [], [], []
    for group in groups:
        rest = -len(group) % TOGETHER
        vectors += [vector for vector, _ in group] + [torch.zeros(8)] * rest
        biases += [-float(vector.square().sum()) / 2 for vector, _ in group] + [_NEVER] * rest
        about += [number for _, number in group] + [0] * rest
        ends.append(len(about))
    return Candidates(
        _apart(torch.stack(vectors)),
        torch.tensor(biases),
        torch.tensor(about, dtype=torch.int32),
        (ends[0], ends[1], ends[2]),
    )


@functools.lru_cache(maxsize=16)
def candidates(device: torch.device) -> Candidates:
    """[`Candidates`] on a device; cached."""
    found = _candidates()
    return found._replace(vectors=found.vectors.to(device), biases=found.biases.to(device), about=found.about.to(device))


@functools.lru_cache(maxsize=16)
def signed_patterns(device: torch.device) -> torch.Tensor:
    """v of each pattern, the last coordinate negative where the sum of the magnitudes is odd: float32 [256, 8]; cached."""
    found = magnitudes().clone()
    found[:, 7] *= 1 - 2 * (found.sum(1) % 2)
    return found.to(device)


@functools.lru_cache(maxsize=16)
def e8_points(device: torch.device) -> torch.Tensor:
    """The 256 points of E8 in the order of their codes: float32 [256 / TOGETHER, 8, TOGETHER]; cached."""
    words = e8.table(torch.device("cpu"))
    nibbles = [(words >> (4 * e8p.WEIGHT_OF_NIBBLE.index(w))) & 0xF for w in range(8)]
    return _apart((torch.stack(nibbles, 1).float() - 8) / 2).to(device)


def _apart(vectors: torch.Tensor) -> torch.Tensor:
    """Vectors [C, 8], of a few at a time coordinate by coordinate."""
    return vectors.view(-1, TOGETHER, 8).transpose(1, 2).contiguous()
