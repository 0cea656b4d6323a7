"""One weight matrix, or several that read the same input: the algorithm of QuIP# (arXiv 2402.04396) from top to bottom."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from .. import codebooks, incoherence, rounding
from ..codebooks import Codebook
from ..incoherence import Transform
from ..rounding import Rounded, Rounding, proxy_loss
from ..rounding.sequential import diagonal_blocks
from .diagnostics import condition_number, histogram

if TYPE_CHECKING:
    from ..config import QuipConfig

logger = logging.getLogger(__name__)

# Damping may grow this often, tenfold each time, until the Hessian has a Cholesky factor; what rounds if it never has.
_ATTEMPTS = 6
_FALLBACK = "quantease"
# On how many rows of each weight scale="auto" tries multiples of the codebook's scale.
_SCALE_ROWS = 128
# Rows without a Hessian are rounded so many numbers at a time, which bounds the memory beside the weight.
CHUNK = 1 << 22


@dataclass
class QuantizedWeight:
    """What replaces a weight W [m, n]:  W ≈ diag(sv) Q_out Ŵ Q_inᵀ diag(su), Ŵ decoded from the stored tensors.

    Attributes:
        tensors: by name, as `Codebook.tensors` describes them.
        su: float32 [n].
        sv: float32 [m].
        statistics: "relative_error", tr(E H Eᵀ) / tr(W H Wᵀ) with the Hessian as it was measured (the share of the
            output's energy that is lost; of the weight's without calibration); "proxy_loss", the same with the damped
            Hessian, as the papers report it; "scale", the multiple of the published scale; "damping"; "condition", of the
            damped and rotated Hessian; "weights_before" and "weights_after" the transforms, see `diagnostics.histogram`.
    """

    tensors: dict[str, torch.Tensor]
    su: torch.Tensor
    sv: torch.Tensor
    statistics: dict[str, Any] = field(default_factory=dict)


@dataclass
class _Rotated:
    """A weight after its transforms, in units of the codebook's points."""

    name: str
    weight: torch.Tensor
    sv: torch.Tensor
    q_out: Transform
    rotated: torch.Tensor
    rms: torch.Tensor


@torch.no_grad()
def quantize_weights(
    weights: Mapping[str, torch.Tensor],
    hessian: torch.Tensor,
    config: QuipConfig,
) -> dict[str, QuantizedWeight]:
    """Quantize linears that read the same input; they get the same su, and are rounded as one stack of rows.

    Args:
        weights: name → float [m_i, n].
        hessian: float32 [n, n] = E[x xᵀ] over the calibration tokens.
        config: `codebook_spec`, `incoherence`, `rescale`, `rounding`, `damping`, `refinement_sweeps`,
            `scale` and `seed` are read.

    Returns:
        name → [`QuantizedWeight`], on the device of the weights.

    Raises:
        ValueError: a weight or the Hessian has NaN or Inf, or a shape does not fit; the message names the module.
    """
    names = ", ".join(weights)
    for name, weight in weights.items():
        check_weight(name, weight)
        if weight.shape[1] != hessian.shape[0]:
            raise ValueError(f"{name} has {weight.shape[1]} columns, but its Hessian is {list(hessian.shape)}")
    if not torch.isfinite(hessian).all():
        raise ValueError(f"the Hessian of {names} has NaN or Inf: the model's activations overflow in its dtype")
    stack = torch.cat([weight.float() for weight in weights.values()])
    q_in = incoherence.get(incoherence.sides(config.incoherence)[0], hessian.shape[0], config.seed)
    hessian = hessian.to(stack)
    damped, damping, su, rotated_hessian, method = _prepare_hessian(hessian, stack, q_in, config, names)
    condition = condition_number(rotated_hessian)
    sizes = [weight.shape[0] for weight in weights.values()]
    parts = [_rotate(name, weight, su, q_in, config) for name, weight in zip(weights, stack.split(sizes), strict=True)]
    book = codebooks.get(config.codebook_spec)
    if config.scale == "auto":
        factors = _best_scales(parts, rotated_hessian, book, method, config)
    else:
        factors = [float(config.scale)] * len(parts)
    scales = [_unit(part, book, factor) for part, factor in zip(parts, factors, strict=True)]
    rounded = _round(
        torch.cat([part.rotated / scale for part, scale in zip(parts, scales, strict=True)]),
        rotated_hessian,
        book,
        method,
        config.refinement_sweeps,
        config.seed,
    )
    results = {}
    for part, factor, codes, points in zip(
        parts, factors, rounded.codes.split(sizes), rounded.points.split(sizes), strict=True
    ):
        decoded = _rotate_back(points[:, : stack.shape[1]], part.q_out, q_in) * su
        sv = _output_scales(part.weight, decoded, damped)
        error = part.weight - decoded * sv[:, None]
        results[part.name] = QuantizedWeight(
            stored(book, codes),
            su,
            sv,
            {
                "relative_error": _ratio(error, part.weight, hessian),
                "proxy_loss": _ratio(error, part.weight, damped),
                "scale": factor,
                "damping": damping,
                "condition": condition,
                "weights_before": histogram(part.weight),
                "weights_after": histogram(part.rotated),
            },
        )
    return results


@torch.no_grad()
def quantize_weight(weight: torch.Tensor, config: QuipConfig, name: str) -> QuantizedWeight:
    """Quantize one weight without calibration: the nearest points after the transforms, or stochastic ones.

    Args:
        weight: float [m, n].
        config: `codebook_spec`, `incoherence`, `rounding`, `scale` and `seed` are read.
        name: of the module, for errors.

    Raises:
        ValueError: the weight has NaN or Inf, or is no matrix; the message names the module.
    """
    check_weight(name, weight)
    size = weight.shape[1]
    book = codebooks.get(config.codebook_spec)
    su = incoherence.signs(size, config.seed, "in").to(weight.device)
    q_in = incoherence.get(incoherence.sides(config.incoherence)[0], size, config.seed)
    part = _rotate(name, weight.float(), su, q_in, config)
    factor = 1.0 if config.scale == "auto" else float(config.scale)
    scale = _unit(part, book, factor)
    codes = torch.empty(book.codes_shape(*weight.shape), dtype=book.code_dtype, device=weight.device)
    points = part.rotated
    method = rounding.get(config.rounding)
    if method.needs_hessian:
        method = rounding.get("nearest")
    rows = max(CHUNK // points.shape[1], 1)
    for begin in range(0, len(points), rows):
        chunk = slice(begin, begin + rows)
        codes[chunk], points[chunk] = method.round(points[chunk] / scale, None, book, 0, config.seed + begin)
    decoded = _rotate_back(points[:, :size], part.q_out, q_in) * su
    energy = decoded.square().sum(1).clamp_min(torch.finfo(torch.float32).tiny)
    sv = (decoded * part.weight).sum(1) / energy
    lost = (part.weight - decoded * sv[:, None]).square().sum() / part.weight.square().sum().clamp_min(1e-30)
    return QuantizedWeight(stored(book, codes), su, sv, {"relative_error": lost.item(), "scale": factor})


@torch.no_grad()
def loss_of_rounding(weights: Mapping[str, torch.Tensor], hessian: torch.Tensor, config: QuipConfig) -> dict[str, float]:
    """What share of the loss of independent errors remains, where these are rounding errors that feedback has shaped.

    Independent errors of relative energy t² lose t² ‖W‖² tr(H) / n. Those of rounding are independent only after the
    transforms, and before the feedback: with H = 𝓛 D 𝓛ᵀ there, they lose t² ‖W‖² tr(D) / n with that W (QuIP, arXiv
    2307.13304, section 3). So the codebook cancels. Measured on SmolLM2, the ratio is 0.07 to 1.

    Args:
        weights, hessian: see [`quantize_weights`].
        config: `codebook`, `incoherence`, `rescale`, `rounding`, `damping` and `seed` are read.

    Returns:
        name → ratio, above 0.
    """
    stack = torch.cat([weight.float() for weight in weights.values()])
    hessian = hessian.to(stack)
    q_in = incoherence.get(incoherence.sides(config.incoherence)[0], len(hessian), config.seed)
    _, _, su, rotated, method = _prepare_hessian(hessian, stack, q_in, config, ", ".join(weights))
    lost = rotated.diagonal().sum()
    cholesky, failed = torch.linalg.cholesky_ex(rotated.double())
    if method.needs_hessian and not failed:
        size = codebooks.get(config.codebook).block_size
        whole = len(rotated) // size * size
        lost = diagonal_blocks(cholesky[:whole, :whole], size).square().sum() + cholesky[whole:, whole:].square().sum()
    energies = {name: _rotate(name, weight.float(), su, q_in, config).rms.square() for name, weight in weights.items()}
    independent = hessian.diagonal().sum()
    tiny = torch.finfo(torch.float32).tiny
    return {
        name: (energies[name] * lost / (weight.float().square().mean() * independent).clamp_min(tiny))
        .clamp_min(tiny)
        .item()
        for name, weight in weights.items()
    }


def stored(book: Codebook, codes: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors that are stored for these codes, in memory of their own."""
    return {name: tensor.clone() for name, tensor in book.store(codes).items()}


def check_weight(name: str, weight: torch.Tensor) -> None:
    """Raise `ValueError` for what is no matrix of finite numbers."""
    if weight.ndim != 2 or weight.numel() == 0:
        raise ValueError(f"{name} has a weight of shape {list(weight.shape)}, expected a matrix that is not empty")
    if not weight.is_floating_point():
        raise ValueError(f"{name} has a weight of {weight.dtype}, expected a floating-point one")
    if not torch.isfinite(weight).all():
        raise ValueError(f"{name} has NaN or Inf in its weight: the checkpoint is damaged, or overflows in {weight.dtype}")


def _prepare_hessian(
    hessian: torch.Tensor, stack: torch.Tensor, q_in: Transform, config: QuipConfig, names: str
) -> tuple[torch.Tensor, float, torch.Tensor, torch.Tensor, Rounding]:
    """H + damping · mean(diag H) · I with as much damping as a Cholesky factor needs; that damping; su; Q-rotated; method.

    The rounding method is the config's, or one that needs no Cholesky factor where there is none.
    """
    diagonal = hessian.diagonal()
    mean = diagonal.mean().item()
    dead = int((diagonal == 0).sum())
    if (diagonal < 0).any():
        raise ValueError(
            f"the Hessian of {names} has diagonal entries below zero (down to {diagonal.min().item():g}): it is no mean of "
            "x xᵀ over tokens"
        )
    if mean == 0:
        logger.warning("%s: every calibration input was zero, so the weights are rounded without feedback", names)
        hessian, mean = torch.zeros_like(hessian), 1 / config.damping
    elif dead:
        logger.warning("%s: %d of %d input columns were zero in all calibration data", names, dead, len(diagonal))
    for attempt in range(_ATTEMPTS):
        damping = config.damping * 10**attempt
        damped = hessian.clone()
        damped.diagonal().add_(damping * mean)
        su, rotated = _rescale_and_rotate(damped, diagonal, stack, q_in, config)
        # Judged as rounding will see it: rounding errors alone can make a small eigenvalue negative.
        if torch.linalg.cholesky_ex(rotated.double()).info == 0:
            if attempt:
                logger.warning("%s: the Hessian is not positive definite, damping grew to %g", names, damping)
            return damped, damping, su, rotated, rounding.get(config.rounding)
    logger.warning(
        "%s: the Hessian is not positive definite even with damping %g, so rounding=%r is replaced by %r, which needs no "
        "Cholesky factor: are the activations those of a working model?",
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
    su, rotated = _rescale_and_rotate(damped, diagonal, stack, q_in, config)
    return damped, damping, su, rotated, rounding.get(_FALLBACK)


def _rescale_and_rotate(
    damped: torch.Tensor, diagonal: torch.Tensor, stack: torch.Tensor, q_in: Transform, config: QuipConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """su [n], and the Hessian after su and Q_in; `diagonal` is that of the Hessian as it was measured."""
    # A column without data has no importance to go by: the average one keeps its weights as good as the others'.
    importance = torch.where(diagonal > 0, damped.diagonal(), damped.diagonal().mean())
    su = incoherence.signs(stack.shape[1], config.seed, "in").to(stack.device)
    if config.rescale:
        su = su * _input_scales(stack, importance)
    return su, _rotate_hessian(damped, su, q_in)


def _input_scales(stack: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    """QuIP's diagonal rescaling [n] (arXiv 2307.13304, section 4 and algorithm 1), of geometric mean 1.

    Columns are multiplied by D = (diag H / diag WᵀW)^¼ before they are rounded, so that important columns get finer
    steps; su, of which these are the magnitudes, divides again.
    """
    energy = stack.square().mean(0)
    floor = max(energy.mean().item() * 1e-6, torch.finfo(stack.dtype).tiny)  # a column of zeros has no scale
    logarithm = (importance.log() - energy.clamp_min(floor).log()) / 4
    return (logarithm.mean() - logarithm).exp()


def _rotate_hessian(damped: torch.Tensor, su: torch.Tensor, q_in: Transform) -> torch.Tensor:
    """Q_inᵀ diag(su) H diag(su) Q_in, exactly symmetric: the Hessian of the rotated inputs."""
    half = q_in.apply_transpose(damped * su)
    rotated = q_in.apply_transpose(half.T.contiguous() * su)
    return (rotated + rotated.T) / 2


def _rotate(name: str, weight: torch.Tensor, su: torch.Tensor, q_in: Transform, config: QuipConfig) -> _Rotated:
    """Q_outᵀ diag(sv)⁻¹ W diag(su)⁻¹ Q_in with random signs for sv."""
    sv = incoherence.signs(weight.shape[0], config.seed, "out").to(weight.device)
    q_out = incoherence.get(incoherence.sides(config.incoherence)[1], weight.shape[0], config.seed)
    rotated = q_in.apply_transpose(weight / su)
    rotated = q_out.apply_transpose(rotated.T.contiguous() * sv).T.contiguous()
    rms = rotated.square().mean().sqrt()
    size = codebooks.get(config.codebook_spec).block_size
    rotated = torch.nn.functional.pad(rotated, (0, -rotated.shape[1] % size))
    return _Rotated(name, weight, sv, q_out, rotated, rms)


def _rotate_back(points: torch.Tensor, q_out: Transform, q_in: Transform) -> torch.Tensor:
    """Q_out Ŵ Q_inᵀ."""
    return q_out.apply(q_in.apply(points).T.contiguous()).T.contiguous()


def _unit(part: _Rotated, book: Codebook, factor: float) -> float:
    """The length that one unit of the codebook stands for; 1 for a weight of zeros."""
    return (part.rms.item() / (book.gaussian_scale * factor)) or 1.0


def _round(
    weight: torch.Tensor, hessian: torch.Tensor, book: Codebook, method: Rounding, sweeps: int, seed: int
) -> Rounded:
    """Round, after completing the Hessian to whole blocks with independent columns."""
    missing = weight.shape[1] - hessian.shape[0]
    if missing:
        mean = hessian.diagonal().mean()
        extra = mean * torch.eye(missing, dtype=hessian.dtype, device=hessian.device)
        hessian = torch.block_diag(hessian, extra)
    return method.round(weight, hessian, book, sweeps, seed)


def _best_scales(
    parts: list[_Rotated], hessian: torch.Tensor, book: Codebook, method: Rounding, config: QuipConfig
) -> list[float]:
    """For each weight, the multiple of the published scale with the least proxy loss on a sample of its rows."""
    samples = []
    for part in parts:
        count = min(_SCALE_ROWS, len(part.rotated))
        step = len(part.rotated) / count
        samples.append(part.rotated[(torch.arange(count, device=part.rotated.device) * step).long()])
    # One call for all: rows are rounded independently, and a method's factorisations are made once.
    units = [[_unit(part, book, factor) for part in parts] for factor in book.scale_factors]
    scaled = [sample / unit for row in units for sample, unit in zip(samples, row, strict=True)]
    points = _round(torch.cat(scaled), hessian, book, method, min(config.refinement_sweeps, 2), config.seed).points
    errors = iter((points - torch.cat(scaled))[:, : hessian.shape[0]].split([len(sample) for sample in scaled]))
    losses = [[proxy_loss(next(errors) * unit, hessian).item() for unit in row] for row in units]
    return [min(zip(column, book.scale_factors, strict=True))[1] for column in zip(*losses, strict=True)]


def _output_scales(weight: torch.Tensor, decoded: torch.Tensor, damped: torch.Tensor) -> torch.Tensor:
    """The sv [m] of least proxy loss for the codes as they are: a weighted least-squares fit, row by row."""
    moved = decoded @ damped
    energy = (moved * decoded).sum(1)
    fitted = (moved * weight).sum(1) / energy.clamp_min(torch.finfo(torch.float32).tiny)
    return torch.where(energy > 0, fitted, torch.zeros_like(fitted))


def _ratio(error: torch.Tensor, weight: torch.Tensor, hessian: torch.Tensor) -> float:
    total = proxy_loss(weight, hessian).item()
    return proxy_loss(error, hessian).item() / total if total > 0 else math.nan
