"""Stochastic rounding: up or down at random, so that the expectation is the weight itself."""

from __future__ import annotations

from dataclasses import replace

import torch

from .base import Problem, Rounded, Rounding
from .nearest import Nearest


class Stochastic(Rounding):
    """Unbiased rounding on a grid (QuIP, arXiv 2307.13304, section 3.2): up with the probability of the fraction.

    A weight beyond the ends of the grid becomes its end.
    """

    name = "stochastic"
    needs_hessian = False
    scalar_only = True

    def round(self, problem: Problem) -> Rounded:
        """See [`Rounding.round`]; `hessian` and `sweeps` have no effect."""
        return Nearest().round(replace(problem, weight=problem.weight + dither(problem.weight, problem.seed)))


def dither(weight: torch.Tensor, seed: int) -> torch.Tensor:
    """Noise after which the nearest of the values one unit apart is the stochastic choice: uniform in [−½, ½].

    Args:
        weight: the noise gets its shape, dtype and device. It is drawn on the CPU, so it is the same for every device.
        seed: random seed.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(weight.shape, generator=generator, dtype=weight.dtype, device="cpu") - 0.5
    return noise.to(weight.device)
