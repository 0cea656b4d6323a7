"""D4, 256 points of a shifted lattice in four dimensions: 2 bits per weight (QuIP#, arXiv 2402.04396, as an alternative).

The points are vectors of half-integers with an even sum, which are a shifted copy of the lattice D4: one byte names the
magnitudes (32 patterns) and the signs.
"""

from __future__ import annotations

import torch

from .base import table
from .table import TableCodebook


@table
def points() -> torch.Tensor:
    """All points in the order of their codes: float32 [256, 4].

    The low five bits of a code are the magnitudes, the high three the signs; the sign of coordinate 3 then follows from
    the even sum, except for the one that bit 7 changes together with all others.
    """
    rows = []
    for code in range(256):
        vector = _magnitudes(code & 31)
        if code >> 5 & 1:
            vector[2] = -vector[2]
        if code >> 6 & 1:
            vector[1] = -vector[1]
        if sum(vector) % 2:
            vector[3] = -vector[3]
        rows.append([-v for v in vector] if code >> 7 else vector)
    return torch.tensor(rows)


def _magnitudes(pattern: int) -> list[float]:
    """The magnitudes of patterns 0 to 31: all 1/2 or all 3/2; two of each; one larger or smaller; one 3/2 and one 5/2."""
    if pattern < 8:
        other, base = (1.5, 0.5) if pattern % 2 else (0.5, 1.5)
        if pattern < 2:
            return [other] * 4 if pattern else [0.5] * 4
        pair = (0, pattern >> 1)
        return [other if i in pair else base for i in range(4)]
    if pattern < 20:
        base, other = ((0.5, 1.5), (1.5, 0.5), (0.5, 2.5))[(pattern - 8) >> 2]
        return [other if i == pattern % 4 else base for i in range(4)]
    three, five = (pattern - 20) % 4, (pattern - 20) // 4
    five += five >= three
    return [1.5 if i == three else 2.5 if i == five else 0.5 for i in range(4)]


class D4(TableCodebook):
    """2 bits per weight. The values are exact in every floating dtype."""

    name = "d4"
    bits = 2.0
    block_size = 4
    gaussian_scale = 1.21
    points = staticmethod(points)
