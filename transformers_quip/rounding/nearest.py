"""Rounding without feedback: every block to its nearest point."""

from __future__ import annotations

from .base import Problem, Rounded, Rounding


class Nearest(Rounding):
    """Does not use the Hessian: the baseline that feedback is measured against."""

    name = "nearest"
    needs_hessian = False

    def round(self, problem: Problem) -> Rounded:
        """See [`Rounding.round`]; only the weight and the codebook are used."""
        codes, points = problem.codebook.encode(problem.codebook.to_blocks(problem.weight))
        return Rounded(codes, problem.codebook.from_blocks(points))
