"""Prepare a Hessian for rounding: damp, rescale and rotate it like the weights, and complete it to whole blocks."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .. import incoherence, rounding
from ..incoherence import Transform
from ..rounding import Rounding

if TYPE_CHECKING:
    from ..config import QuipConfig

logger = logging.getLogger(__name__)

# Damping grows tenfold at most this often, until the Hessian has a Cholesky factor. If it never has, this method rounds.
_ATTEMPTS = 6
_FALLBACK = "quantease"


@dataclass(frozen=True, eq=False)
class PreparedHessian:
    """The prepared Hessian of one input, for all linears that read it.

    Attributes:
        damped: float32 [n, n], H + damping · mean(diag H) · I: the Hessian of the proxy loss.
        damping: enough for a Cholesky factor: `config.damping`, or a power of ten times it.
        su: float32 [n]: random signs, times QuIP's diagonal rescaling (`config.rescale`).
        q_in: the transform of the input side.
        rotated: float32 [n, n], Q_inᵀ diag(su) damped diag(su) Q_in, exactly symmetric.
        method: the rounding method: the config's, or a fallback without a Cholesky factor if there is none.
    """

    damped: torch.Tensor
    damping: float
    su: torch.Tensor
    q_in: Transform
    rotated: torch.Tensor
    method: Rounding

    def completed(self, columns: int) -> torch.Tensor:
        """`rotated` for a weight that was completed to this many columns: the added ones are independent."""
        missing = columns - len(self.rotated)
        if not missing:
            return self.rotated
        mean = self.rotated.diagonal().mean()
        extra = mean * torch.eye(missing, dtype=self.rotated.dtype, device=self.rotated.device)
        return torch.block_diag(self.rotated, extra)


def prepare_hessian(hessian: torch.Tensor, weights: torch.Tensor, config: QuipConfig, names: str) -> PreparedHessian:
    """Damp, rescale and rotate a Hessian.

    Args:
        hessian: float32 [n, n] = E[x xᵀ], as it was measured.
        weights: float32 [m, n], the rows of all weights that read this input.
        config: `incoherence`, `rescale`, `rounding`, `damping` and `seed` are read.
        names: of the modules, for messages.

    Raises:
        ValueError: the Hessian has NaN or Inf, or a diagonal entry below zero.
    """
    if not torch.isfinite(hessian).all():
        raise ValueError(f"the Hessian of {names} has NaN or Inf: the model's activations overflow in its dtype")
    diagonal = hessian.diagonal()
    mean = diagonal.mean().item()
    dead = int((diagonal == 0).sum())
    if (diagonal < 0).any():
        raise ValueError(
            f"the Hessian of {names} has diagonal entries below zero (down to {diagonal.min().item():g}): it is not a mean "
            "of x xᵀ over tokens"
        )
    if mean == 0:
        logger.warning("%s: every calibration input was zero, so the weights are rounded without feedback", names)
        hessian, mean = torch.zeros_like(hessian), 1 / config.damping
    elif dead:
        logger.warning("%s: %d of %d input columns were zero in all calibration data", names, dead, len(diagonal))
    q_in = incoherence.get(incoherence.sides(config.incoherence)[0], len(hessian), config.seed)
    for attempt in range(_ATTEMPTS):
        damping = config.damping * 10**attempt
        damped = hessian.clone()
        damped.diagonal().add_(damping * mean)
        su = _input_vector(damped, diagonal, weights, config)
        rotated = _rotate(damped, su, q_in)
        # Judged in the form for rounding: rounding errors alone can make a small eigenvalue negative.
        if torch.linalg.cholesky_ex(rotated.double()).info == 0:
            if attempt:
                logger.warning("%s: the Hessian is not positive definite, damping grew to %g", names, damping)
            return PreparedHessian(damped, damping, su, q_in, rotated, rounding.get(config.rounding))
    logger.warning(
        "%s: the Hessian is not positive definite even with damping %g: falling back from rounding=%r to %r, which needs "
        "no Cholesky factor. This usually means broken activations: check the model and the calibration text",
        names,
        damping,
        config.rounding,
        _FALLBACK,
    )
    # No E[x xᵀ] has covariances above this; without the limit, descent would follow the false ones off the codebook.
    limit = diagonal.sqrt()
    damped = (damped + damped.T) / 2
    damped = damped.clamp(-limit[:, None] * limit, limit[:, None] * limit)
    damped.diagonal().copy_(diagonal + damping * mean)
    su = _input_vector(damped, diagonal, weights, config)
    return PreparedHessian(damped, damping, su, q_in, _rotate(damped, su, q_in), rounding.get(_FALLBACK))


# At 2 bits the second order of the loss at the dense model is only a part of the truth. So the error may not grow without
# limit in directions of the outputs in which its gradient is small. `benchmarks/two_sided.py --dampings` measures it.
OUTPUT_DAMPING = 0.4


def prepare_output_hessian(hessian: torch.Tensor, signs: torch.Tensor, q_out: Transform) -> torch.Tensor:
    """The output-side Hessian after the transforms of the output side, damped: Q_outᵀ diag(signs) H diag(signs) Q_out + …

    `OUTPUT_DAMPING` of the mean of the diagonal is added to it, tenfold until there is a Cholesky factor.

    Args:
        hessian: float32 [m, m], up to a factor.
        signs: float32 [m].
        q_out: the transform of the output side.

    Returns:
        float32 [m, m] with a diagonal of mean 1 before the damping.

    Raises:
        ValueError: it has no positive diagonal, or no Cholesky factor even with much damping.
    """
    mean = hessian.diagonal().mean()
    if not mean > 0:
        raise ValueError("an output-side Hessian without a positive diagonal")
    rotated = _rotate(hessian / mean, signs, q_out)
    for attempt in range(_ATTEMPTS):
        damped = rotated.clone()
        damped.diagonal().add_(OUTPUT_DAMPING * 10**attempt)
        if torch.linalg.cholesky_ex(damped.double()).info == 0:
            return damped
    raise ValueError("an output-side Hessian that is not positive definite")


def _input_vector(damped: torch.Tensor, diagonal: torch.Tensor, weights: torch.Tensor, config: QuipConfig) -> torch.Tensor:
    """su [n]; `diagonal` belongs to the Hessian as it was measured."""
    su = incoherence.signs(weights.shape[1], config.seed, "in").to(weights.device)
    if not config.rescale:
        return su
    # The importance of a column without data is unknown: the average keeps its weights as good as the others'.
    return su * _input_scales(weights, torch.where(diagonal > 0, damped.diagonal(), damped.diagonal().mean()))


def _input_scales(weights: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    """QuIP's diagonal rescaling [n] (arXiv 2307.13304, section 4 and algorithm 1), of geometric mean 1.

    Columns are multiplied by D = (diag H / diag WᵀW)^¼ before they are rounded, so that important columns get finer
    steps; su, of which these are the magnitudes, divides again.
    """
    energy = weights.square().mean(0)
    floor = max(energy.mean().item() * 1e-6, torch.finfo(weights.dtype).tiny)  # a column of zeros has no scale
    logarithm = (importance.log() - energy.clamp_min(floor).log()) / 4
    return (logarithm.mean() - logarithm).exp()


def _rotate(damped: torch.Tensor, su: torch.Tensor, q_in: Transform) -> torch.Tensor:
    """Q_inᵀ diag(su) H diag(su) Q_in, exactly symmetric: the Hessian of the rotated inputs."""
    half = q_in.apply_transpose(damped * su)
    rotated = q_in.apply_transpose(half.T.contiguous() * su)
    return (rotated + rotated.T) / 2
