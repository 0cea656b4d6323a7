"""256 short vectors of the lattice E8: one byte for 8 weights (QuIP#, arXiv 2402.04396).

E8 is the union of the vectors of integers and the vectors of half-integers, both with an even sum. The byte names zero,
one of the 240 shortest vectors (squared norm 2), or one of 15 of the 16 vectors ±2 along an axis. One bit per weight is
little, so it serves as the second stage of another codebook (see `residual`), not alone.
"""

from __future__ import annotations

import itertools

import torch

from .base import table
from .table import TableCodebook


@table
def points() -> torch.Tensor:
    """All points in the order of their codes: float32 [256, 8].

    Integers in lexicographic order (with zero in their middle), then half-integers, then +2 and −2 along the axes,
    without −2 along the last.
    """
    whole = [v for v in itertools.product((-1.0, 0.0, 1.0), repeat=8) if sum(c * c for c in v) in (0, 2)]
    halves = [v for v in itertools.product((-0.5, 0.5), repeat=8) if sum(v) % 2 == 0]
    axes = torch.cat([2 * torch.eye(8), 0 - 2 * torch.eye(8)[:7]])  # 0 − 0 is not −0
    return torch.cat([torch.tensor(whole + halves), axes])


class E8(TableCodebook):
    """1 bit per weight. The values are exact in every floating dtype."""

    name = "e8"
    bits = 1.0
    block_size = 8
    gaussian_scale = 0.7
    points = staticmethod(points)
