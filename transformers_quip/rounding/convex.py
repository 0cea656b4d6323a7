"""Stochastic rounding with bounded feedback, found by a convex program (QuIP, arXiv 2307.13304, algorithm 5)."""

from __future__ import annotations

import logging

import torch

from .base import Problem, Rounded, Rounding
from .sequential import round_with_feedback
from .stochastic import dither

logger = logging.getLogger(__name__)

# The c of the program: the variance that feedback may add to one weight's error. The paper's experiments use 1.
BOUND = 1.0
_TOLERANCE = 1e-3
_ITERATIONS = 200
# The dual value may fall below some of the last values, but not below all (Grippo, Lampariello and Lucidi's line search).
_MEMORY = 5


class Convex(Rounding):
    """The method of QuIP's guarantee for finite grids.

    LDLQ's feedback can add up, and push a weight beyond the ends of the grid. Here the feedback is the best among those
    with which no weight moves much further than by its own rounding. Rounding is stochastic, so that errors do not align.
    """

    name = "convex"
    needs_hessian = True
    scalar_only = True

    def round(self, problem: Problem) -> Rounded:
        """See [`Rounding.round`]; `sweeps` has no effect."""
        return round_with_feedback(
            problem.weight,
            bounded_feedback(problem.required_hessian),
            problem.codebook,
            offset=dither(problem.weight, problem.seed),
        )


def bounded_feedback(hessian: torch.Tensor, bound: float = BOUND) -> torch.Tensor:
    """The feedback R⁻¹ of the program: minimise tr(R H Rᵀ) over unit lower triangular R with ‖R eᵢ‖² ≤ 1 + bound for all i.

    With the errors η of rounding, W − Ŵ = −η R: the objective is their expected proxy loss, and ‖R eᵢ‖² the growth of
    the variance of column i. For multipliers λ ≥ 0 of the constraints the minimiser is known: R⁻¹ is the LDL factor of
    H + diag(λ). So only the concave dual, tr D(H + diag(λ)) − (1 + bound) Σ λ, remains to be maximised: by projected
    gradients ‖R eᵢ‖² − 1 − bound, scaled by the dual's second derivatives, with spectral steps (Birgin, Martínez and
    Raydan, "Nonmonotone spectral projected gradient methods on convex sets", SIAM J. Optim. 10, 2000). Without a bound,
    λ = 0, and this is LDLQ.

    Args:
        hessian: [n, n], positive definite.
        bound: above 0.

    Returns:
        R⁻¹, unit lower triangular [n, n] of the dtype of `hessian`; constraints and optimum hold to one part in 1000.

    Raises:
        torch.linalg.LinAlgError: if H is not positive definite.
    """
    matrix = hessian.double() / hessian.diagonal().double().mean()
    multipliers = torch.zeros_like(matrix.diagonal())
    value, gradient, curvature, factor = _dual(matrix, multipliers, bound)
    step, history = 1.0, [value]
    for _ in range(_ITERATIONS):
        slack = (multipliers * gradient.abs()).sum().item()
        excess = gradient.max().item() / (1 + bound)
        if excess <= _TOLERANCE and slack <= _TOLERANCE * value:
            return factor.to(hessian.dtype)
        scale = 1 / curvature.clamp_min(1e-9)
        while True:
            trial = (multipliers + step * scale * gradient).clamp_min_(0)
            move = trial - multipliers
            found, *state = _dual(matrix, trial, bound)
            if found >= min(history[-_MEMORY:]) + 1e-4 * (gradient * move).sum().item() or step < 1e-9:
                break
            step *= 0.4
        bend = (move * (gradient - state[0])).sum().item()
        step = min(max((move.square() / scale).sum().item() / bend, 1e-3), 1e3) if bend > 0 else 1.0
        multipliers, (gradient, curvature, factor) = trial, state
        value = found
        history.append(found)
    logger.warning("the program for bounded feedback stopped with its constraints exceeded by %.2g of the bound", excess)
    return factor.to(hessian.dtype)


def _dual(matrix: torch.Tensor, multipliers: torch.Tensor, bound: float) -> tuple:
    """The dual's value, gradient and negative second derivatives at λ, and R⁻¹; all float64."""
    cholesky = torch.linalg.cholesky(matrix + torch.diag(multipliers))
    scale = cholesky.diagonal()
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    squares = (torch.linalg.solve_triangular(cholesky, identity, upper=False) * scale[:, None]).square_()  # of R
    norms = squares.sum(0)
    value = scale.square().sum().item() - (1 + bound) * multipliers.sum().item()
    curvature = 2 * (squares / scale.square()[:, None] * (norms - squares.cumsum(0))).sum(0)
    return value, norms - (1 + bound), curvature, cholesky / scale
