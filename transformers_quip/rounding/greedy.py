"""Greedy coordinate descent from the weights themselves (QuIP, arXiv 2307.13304, supplement)."""

from __future__ import annotations

from .base import Problem, Rounded, Rounding
from .sequential import inverse_of_blocks, start, sweep


class Greedy(Rounding):
    """Move every block to the best point while all others are fixed, until nothing changes.

    The first pass starts from Ŵ = W: a column is rounded as if those after it could be kept exactly.
    """

    name = "greedy"
    needs_hessian = True

    def round(self, problem: Problem) -> Rounded:
        """See [`Rounding.round`]; at most 1 + `sweeps` passes."""
        rounded = start(problem.weight, problem.codebook)
        conditional = inverse_of_blocks(problem.required_hessian, problem.codebook.block_size)
        for index in range(1 + problem.sweeps):
            changed = sweep(problem, conditional, rounded)
            if not changed and index:
                break
        return rounded
