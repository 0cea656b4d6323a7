"""Cyclic coordinate descent that needs no factor of the Hessian (QuantEase, arXiv 2309.01885)."""

from __future__ import annotations

import torch

from .base import Problem, Rounded, Rounding
from .sequential import inverse_of_blocks, start, sweep

# Every third pass is relaxed, which lets the descent leave a point where no single change helps.
_RELAXED = 3


class QuantEase(Rounding):
    """Passes of coordinate descent, every third of them free of the codebook.

    The best pass of each row is kept (of each group of rows that are coded together).

    H needs only a positive diagonal (or, for a codebook of several weights, diagonal blocks with an inverse), so this
    method is the fallback for a Hessian without a Cholesky factor.
    """

    name = "quantease"
    needs_hessian = True

    def round(self, problem: Problem) -> Rounded:
        """See [`Rounding.round`]; 1 + `sweeps` passes, the relaxed ones among them."""
        weight, hessian, together = problem.weight, problem.required_hessian, problem.codebook.rows_together
        rounded = start(weight, problem.codebook)
        conditional = inverse_of_blocks(hessian, problem.codebook.block_size)
        sweep(problem, conditional, rounded)
        best = Rounded(*(part.clone() for part in rounded))
        losses = _losses(weight - rounded.points, hessian, together)
        for index in range(1, 1 + problem.sweeps):
            if index % _RELAXED == _RELAXED - 1 and index < problem.sweeps:
                rounded.points.copy_(weight - relaxed(weight - rounded.points, hessian))
                continue
            changed = sweep(problem, conditional, rounded)
            found = _losses(weight - rounded.points, hessian, together)
            better = found < losses
            losses = torch.where(better, found, losses)
            _take(best.codes, rounded.codes, better)
            _take(best.points, rounded.points, better[:, None].expand(-1, together).reshape(-1))
            if not changed:
                break
        return best


def _take(best: torch.Tensor, found: torch.Tensor, rows: torch.Tensor) -> None:
    """The rows of `found` that a mask names, into `best`; on the device, without a list of their numbers."""
    best.copy_(torch.where(rows.view(-1, *[1] * (best.ndim - 1)), found, best))


def relaxed(error: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """The error after a pass of coordinate descent without a codebook: every weight to its conditional optimum.

    Such a pass, from the last column to the first, is one step of Gauss and Seidel's iteration for E H = 0.

    Args:
        error: float32 [m, n], W − Ŵ before the pass.
        hessian: float32 [n, n] with a positive diagonal.
    """
    return torch.linalg.solve_triangular(hessian.tril(), -error @ hessian.triu(1), upper=False, left=False)


def _losses(error: torch.Tensor, hessian: torch.Tensor, together: int) -> torch.Tensor:
    """The proxy loss of every group of this many rows: [m / together]."""
    return ((error @ hessian) * error).sum(1).reshape(-1, together).sum(1)
