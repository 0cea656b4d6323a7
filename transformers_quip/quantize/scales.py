"""su and sv of least proxy loss for codes as they are: alternating least squares in the Hessian's metric."""

from __future__ import annotations

from collections.abc import Sequence

import torch

# Of the mean of the diagonal: the system for su may be singular, for columns of zeros.
_RIDGE = 1e-6


def refit(
    weights: Sequence[torch.Tensor], values: Sequence[torch.Tensor], hessian: torch.Tensor, su: torch.Tensor, rounds: int
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The factors with which decoded values come nearest to the weights.

    With decoded values V_i before su and sv, the errors are E_i = W_i − diag(sv_i) V_i diag(su). For fixed su, each sv is a
    least-squares fit, row by row. For fixed sv, su solves

        ( H ∘ Σ_i A_iᵀ A_i ) su = Σ_i diag(A_iᵀ W_i H),    A_i = diag(sv_i) V_i.

    Args:
        weights: float32 [m_i, n], of linears that read one input and share su.
        values: float32 [m_i, n].
        hessian: float32 [n, n], the damped one.
        su: float32 [n], as it is before.
        rounds: how often su is fitted; 0: only sv is.

    Returns:
        (su, the sv of each weight).
    """
    scales = [output_scales(weight, value * su, hessian) for weight, value in zip(weights, values, strict=True)]
    for _ in range(rounds):
        su = _input_scales(weights, values, scales, hessian, su)
        scales = [output_scales(weight, value * su, hessian) for weight, value in zip(weights, values, strict=True)]
    return su, scales


def output_scales(weight: torch.Tensor, decoded: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """The sv [m] of least proxy loss for decoded values V diag(su) [m, n]: a least-squares fit, row by row."""
    moved = decoded @ hessian
    energy = (moved * decoded).sum(1)
    fitted = (moved * weight).sum(1) / energy.clamp_min(torch.finfo(torch.float32).tiny)
    return torch.where(energy > 0, fitted, torch.zeros_like(fitted))


def _input_scales(
    weights: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    hessian: torch.Tensor,
    su: torch.Tensor,
) -> torch.Tensor:
    """The su [n] of least proxy loss for fixed sv, computed in float64 as a change of `su`."""
    system = torch.zeros(hessian.shape, dtype=torch.float64, device=hessian.device)
    right = torch.zeros(len(su), dtype=torch.float64, device=hessian.device)
    for weight, value, sv in zip(weights, values, scales, strict=True):
        scaled = value * sv[:, None]
        system += (scaled.T @ scaled).double()
        right += (scaled * ((weight - scaled * su) @ hessian)).sum(0, dtype=torch.float64)
    system *= hessian.double()
    system.diagonal().add_(_RIDGE * system.diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex(system)
    if failed or not torch.isfinite(factor).all():
        return su
    return (su.double() + torch.cholesky_solve(right[:, None], factor)[:, 0]).float()
