"""The tables with which weights are quantized in trellis codes that have one. A layer stores the table that it has."""

from __future__ import annotations

import torch

from .base import table

# Tables of more rows are drawn at random: they are large enough to have the right distribution by themselves.
_MOST_FITTED = 1 << 12
_SAMPLES, _ITERATIONS = 1 << 15, 10


@table
def default_table(code: str, rows: int, columns: int) -> torch.Tensor:
    """Values that suit a unit Gaussian: float32 [rows, columns], exact in bfloat16 and in float16.

    Up to 4096 rows they are quantiles or, of pairs, the centres of k-means (QTIP, arXiv 2406.11235, section 3.1.2). The
    first value of code hyb has either sign, so that only positive ones are needed.
    """
    generator = torch.Generator().manual_seed(2 * rows + columns)
    if rows > _MOST_FITTED:
        values = torch.randn(rows, columns, generator=generator)
    elif columns == 1:
        shares = (torch.randperm(rows, generator=generator).double() + 0.5) / rows
        values = torch.special.ndtri((1 + shares) / 2 if code == "hyb" else shares)[:, None]
    else:
        samples = torch.randn(_SAMPLES, columns, generator=generator)
        if code == "hyb":
            samples[:, 0].abs_()
        values = _centres(samples, rows)
    # float16 has multiples of 2^-14 only, of numbers as small as that
    return ((values.double() * 2**14).round() / 2**14).bfloat16().float()


def _centres(samples: torch.Tensor, count: int) -> torch.Tensor:
    """Centres [count, columns] of Lloyd's iteration, which begins with the first samples."""
    centres = samples[:count].clone()
    for _ in range(_ITERATIONS):
        nearest = torch.cat([torch.cdist(part, centres).argmin(1) for part in samples.split(1 << 12)])
        sums = torch.zeros_like(centres).index_add_(0, nearest, samples)
        members = nearest.bincount(minlength=count)[:, None]
        centres = torch.where(members > 0, sums / members.clamp_min(1), centres)
    return centres
