"""One weight matrix, or several that read the same input: the algorithm of QuIP# (arXiv 2402.04396) from top to bottom."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from .. import codebooks, incoherence, rounding
from ..calibration.precision import cpu_matmul_precision
from ..codebooks import Codebook
from ..incoherence import Transform
from ..rounding import Problem, Rounded, Rounding, proxy_loss
from ..rounding.sequential import diagonal_blocks
from .diagnostics import condition_number, histogram
from .hessian import PreparedHessian, prepare_hessian, prepare_output_hessian
from .scales import refit

if TYPE_CHECKING:
    from ..config import QuipConfig

logger = logging.getLogger(__name__)

# Number of rows of each weight on which scale="auto" tries multiples of the codebook's scale.
_SCALE_ROWS = 128
# Without a Hessian this many numbers are rounded at a time, which bounds the memory of intermediate results.
CHUNK = 1 << 22
# Storing sv in the model's dtype is worth a warning if it adds this share to the squared error of the weight.
_STORAGE_SHARE = 0.5


@dataclass
class QuantizedWeight:
    """The replacement of a weight W [m, n]:  W ≈ diag(sv) Q_out Ŵ Q_inᵀ diag(su), Ŵ decoded from the stored tensors.

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

    def cpu(self) -> QuantizedWeight:
        """The same on the CPU."""
        tensors = {name: tensor.cpu() for name, tensor in self.tensors.items()}
        return QuantizedWeight(tensors, self.su.cpu(), self.sv.cpu(), self.statistics)


@dataclass
class _Part:
    """One of the weights that are rounded together, after its transforms.

    Attributes:
        name: of the module.
        weight: float32 [m, n], W.
        stored_as: the dtype in which sv will be stored: the dtype of the module's weight.
        q_out: the transform of the output side.
        rotated: float32, Q_outᵀ diag(signs) W diag(su)⁻¹ Q_in, completed by zeros to whole blocks of the codebook.
        rms: scalar, of `rotated` without the completing zeros.
        factor: the multiple of the codebook's published scale at which it is rounded.
        hessian_out: float32 [m, m], the output-side Hessian after the transforms, completed like `rotated`; None for none.
    """

    name: str
    weight: torch.Tensor
    stored_as: torch.dtype
    q_out: Transform
    rotated: torch.Tensor
    rms: torch.Tensor
    factor: float = 1.0
    hessian_out: torch.Tensor | None = None

    def unit(self, book: Codebook, factor: float | None = None) -> float:
        """The length of one unit of the codebook; 1 for a weight of zeros."""
        return (self.rms.item() / (book.gaussian_scale * (self.factor if factor is None else factor))) or 1.0

    def decoded(self, points: torch.Tensor, q_in: Transform) -> torch.Tensor:
        """Q_out Ŵ Q_inᵀ [m, n] for the points that this part was rounded to."""
        rows, columns = self.weight.shape
        return self.q_out.apply(q_in.apply(points[:rows, :columns]).T.contiguous()).T.contiguous()


@cpu_matmul_precision("ieee")  # a Hessian rotated in lower precision is no longer positive definite
@torch.inference_mode(False)
@torch.no_grad()
def quantize_weights(
    weights: Mapping[str, torch.Tensor],
    hessian: torch.Tensor,
    config: QuipConfig,
    outputs: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, QuantizedWeight]:
    """Quantize linears that read the same input; they get the same su, and are rounded as one stack of rows.

    Args:
        weights: name → float [m_i, n].
        hessian: float32 [n, n] = E[x xᵀ] over the calibration tokens.
        config: `codebook_spec`, `incoherence`, `rescale`, `rounding`, `damping`, `sweeps`,
            `scale` and `seed` are read.
        outputs: name → float32 [m_i, m_i], output-side Hessians up to a factor, for a two-sided rounding method.

    Returns:
        name → [`QuantizedWeight`], on the device of the weights.

    Raises:
        ValueError: a weight or the Hessian has NaN or Inf, or a shape does not fit; the message names the module.
    """
    book = codebooks.get(config.codebook_spec)
    for name, weight in weights.items():
        check_weight(name, weight)
        if weight.shape[1] != hessian.shape[0]:
            raise ValueError(f"{name} has {weight.shape[1]} columns, but its Hessian is {list(hessian.shape)}")
        check_shape(name, weight, book)
    stack = torch.cat([weight.float() for weight in weights.values()])
    hessian = hessian.to(stack)
    prepared = prepare_hessian(hessian, stack, config, ", ".join(weights))
    condition = condition_number(prepared.rotated)
    rows = stack.split([len(weight) for weight in weights.values()])
    parts = [
        _rotate(name, part, weight.dtype, prepared.su, prepared.q_in, book, config)
        for (name, weight), part in zip(weights.items(), rows, strict=True)
    ]
    if config.scale == "auto":
        _choose_scales(parts, prepared, book, config)
    else:
        for part in parts:
            part.factor = float(config.scale)
    for part in parts:
        if outputs and part.name in outputs:
            part.hessian_out = _completed_output(part, outputs[part.name].to(stack), config)
    scaled = [part.rotated / part.unit(book) for part in parts]
    sides = [part.hessian_out for part in parts]
    rounded = _round(scaled, prepared, book, config.sweeps, config.seed, sides)
    results = {}
    values = [part.decoded(one.points, prepared.q_in) for part, one in zip(parts, rounded, strict=True)]
    su, scales = refit([part.weight for part in parts], values, prepared.damped, prepared.su, config.refit)
    for part, (codes, _), decoded, sv in zip(parts, rounded, values, scales, strict=True):
        error = part.weight - decoded * su * sv[:, None]
        _warn_of_storage(part, sv, (decoded * su).square().sum(1), error.square().sum())
        results[part.name] = QuantizedWeight(
            stored(book, codes),
            su,
            sv,
            {
                "relative_error": _ratio(error, part.weight, hessian),
                "proxy_loss": _ratio(error, part.weight, prepared.damped),
                "scale": part.factor,
                "damping": prepared.damping,
                "condition": condition,
                "weights_before": histogram(part.weight),
                "weights_after": histogram(part.rotated),
            },
        )
    return results


@torch.inference_mode(False)
@torch.no_grad()
def quantize_weight(weight: torch.Tensor, config: QuipConfig, name: str) -> QuantizedWeight:
    """Quantize one weight without calibration: the nearest points after the transforms, or stochastic ones.

    Args:
        weight: float [m, n].
        config: `codebook_spec`, `incoherence`, `rounding`, `scale` and `seed` are read.
        name: of the module, for errors.

    Raises:
        ValueError: the weight has NaN or Inf, or is not a matrix; the message names the module.
    """
    check_weight(name, weight)
    rows, size = weight.shape
    book = codebooks.get(config.codebook_spec)
    check_shape(name, weight, book)
    su = incoherence.signs(size, config.seed, "in").to(weight.device)
    q_in = incoherence.get(incoherence.sides(config.incoherence)[0], size, config.seed)
    part = _rotate(name, weight.float(), weight.dtype, su, q_in, book, config)
    part.factor = 1.0 if config.scale == "auto" else float(config.scale)
    unit, method, points = part.unit(book), method_without_hessian(config), part.rotated
    codes = torch.empty(book.codes_shape(rows, size), dtype=book.code_dtype, device=weight.device)
    for begin, end in chunks_of_rows(points.shape[0], points.shape[1], book, method):
        part_of_codes = slice(begin // book.rows_together, end // book.rows_together)
        found = method.round(Problem(points[begin:end] / unit, None, book, seed=config.seed + begin))
        codes[part_of_codes], points[begin:end] = found
    decoded = part.decoded(points, q_in) * su
    energy = decoded.square().sum(1).clamp_min(torch.finfo(torch.float32).tiny)
    sv = (decoded * part.weight).sum(1) / energy
    error = (part.weight - decoded * sv[:, None]).square().sum()
    _warn_of_storage(part, sv, energy, error)
    lost = error / part.weight.square().sum().clamp_min(1e-30)
    return QuantizedWeight(stored(book, codes), su, sv, {"relative_error": lost.item(), "scale": part.factor})


@cpu_matmul_precision("ieee")
@torch.inference_mode(False)
@torch.no_grad()
def loss_of_rounding(weights: Mapping[str, torch.Tensor], hessian: torch.Tensor, config: QuipConfig) -> dict[str, float]:
    """The loss of rounding errors with feedback, as a share of the loss of independent errors of the same size.

    Independent errors of relative energy t² lose t² ‖W‖² tr(H) / n. Rounding errors are independent only after the
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
    prepared = prepare_hessian(hessian, stack, config, ", ".join(weights))
    book, rotated = codebooks.get(config.codebook_spec), prepared.rotated
    lost = rotated.diagonal().sum()
    cholesky, failed = torch.linalg.cholesky_ex(rotated.double())
    if prepared.method.needs_hessian and not failed:
        whole = len(rotated) // book.block_size * book.block_size
        lost = diagonal_blocks(cholesky[:whole, :whole], book.block_size).square().sum()
        lost = lost + cholesky[whole:, whole:].square().sum()
    independent = hessian.diagonal().sum()
    tiny = torch.finfo(torch.float32).tiny
    result = {}
    for name, weight in weights.items():
        part = _rotate(name, weight.float(), weight.dtype, prepared.su, prepared.q_in, book, config)
        ratio = part.rms.square() * lost / (part.weight.square().mean() * independent).clamp_min(tiny)
        result[name] = ratio.clamp_min(tiny).item()
    return result


def method_without_hessian(config: QuipConfig) -> Rounding:
    """The config's rounding method without calibration: a method that needs a Hessian becomes "nearest"."""
    method = rounding.get(config.rounding)
    return rounding.get("nearest") if method.needs_hessian else method


def chunks_of_rows(rows: int, columns: int, book: Codebook, method: Rounding) -> list[tuple[int, int]]:
    """The ranges of rows that are rounded at a time: whole groups of rows; all rows for a method that looks at all."""
    if not method.rows_independent:
        return [(0, rows)]
    at_once = max(CHUNK // columns // book.rows_together, 1) * book.rows_together
    return [(begin, min(begin + at_once, rows)) for begin in range(0, rows, at_once)]


def stored(book: Codebook, codes: torch.Tensor) -> dict[str, torch.Tensor]:
    """The stored tensors of these codes, in their own memory."""
    return {name: tensor.clone() for name, tensor in book.store(codes).items()}


def check_weight(name: str, weight: torch.Tensor) -> None:
    """Raise `ValueError` for anything but a matrix of finite numbers."""
    if weight.ndim != 2 or weight.numel() == 0:
        raise ValueError(f"{name} has a weight of shape {list(weight.shape)}, expected a matrix that is not empty")
    if not weight.is_floating_point():
        raise ValueError(f"{name} has a weight of {weight.dtype}, expected a floating-point one")
    if not torch.isfinite(weight).all():
        raise ValueError(f"{name} has NaN or Inf in its weight: the checkpoint is damaged, or overflows in {weight.dtype}")


def check_shape(name: str, weight: torch.Tensor, book: Codebook) -> None:
    """Raise `ValueError` for a weight of a shape that the codebook cannot store."""
    try:
        book.tensors(*weight.shape)
    except ValueError as error:
        raise ValueError(f"{name} has shape {list(weight.shape)}: {error}") from None


def _rotate(
    name: str,
    weight: torch.Tensor,
    stored_as: torch.dtype,
    su: torch.Tensor,
    q_in: Transform,
    book: Codebook,
    config: QuipConfig,
) -> _Part:
    """Q_outᵀ diag(signs) W diag(su)⁻¹ Q_in."""
    rows, columns = weight.shape
    signs = incoherence.signs(rows, config.seed, "out").to(weight.device)
    q_out = incoherence.get(incoherence.sides(config.incoherence)[1], rows, config.seed)
    rotated = q_in.apply_transpose(weight / su)
    rotated = q_out.apply_transpose(rotated.T.contiguous() * signs).T.contiguous()
    rms = rotated.square().mean().sqrt()
    rotated = torch.nn.functional.pad(rotated, (0, -columns % book.block_size, 0, -rows % book.rows_together))
    return _Part(name, weight, stored_as, q_out, rotated, rms)


def _completed_output(part: _Part, hessian: torch.Tensor, config: QuipConfig) -> torch.Tensor:
    """The output-side Hessian of a part as its rotated weight needs it; rows that complete a group are independent."""
    rows = len(part.weight)
    signs = incoherence.signs(rows, config.seed, "out").to(hessian.device)
    try:
        found = prepare_output_hessian(hessian, signs, part.q_out)
    except ValueError as error:
        raise ValueError(f"{part.name} has {error}: its gradients are zero or broken") from None
    missing = len(part.rotated) - rows
    return torch.block_diag(found, torch.eye(missing, dtype=found.dtype, device=found.device)) if missing else found


def _round(
    weights: list[torch.Tensor],
    prepared: PreparedHessian,
    book: Codebook,
    sweeps: int,
    seed: int,
    outputs: list[torch.Tensor | None] | None = None,
) -> list[Rounded]:
    """Round weights that read one input: as one stack if rows are rounded independently, else one by one."""
    hessian = prepared.completed(weights[0].shape[1])
    if not prepared.method.rows_independent:
        sides = outputs or [None] * len(weights)
        return [
            prepared.method.round(Problem(weight, hessian, book, sweeps, seed, side))
            for weight, side in zip(weights, sides, strict=True)
        ]
    codes, points = prepared.method.round(Problem(torch.cat(weights), hessian, book, sweeps, seed))
    rows = [len(weight) for weight in weights]
    groups = [count // book.rows_together for count in rows]
    return [Rounded(*both) for both in zip(codes.split(groups), points.split(rows), strict=True)]


def _choose_scales(parts: list[_Part], prepared: PreparedHessian, book: Codebook, config: QuipConfig) -> None:
    """Give each weight the multiple of the published scale with the least proxy loss on a sample of its rows."""
    if len(book.scale_factors) == 1:
        for part in parts:
            part.factor = book.scale_factors[0]
        return
    samples = [_sample(part, book) for part in parts]
    # One call for all: if rows are rounded independently, a method's factorisations are computed once.
    units = [[part.unit(book, factor) for part in parts] for factor in book.scale_factors]
    scaled = [sample / unit for row in units for sample, unit in zip(samples, row, strict=True)]
    rounded = _round(scaled, prepared, book, min(config.sweeps, 2), config.seed)
    columns = len(prepared.rotated)
    errors = iter([(one.points - weight)[:, :columns] for one, weight in zip(rounded, scaled, strict=True)])
    losses = [[proxy_loss(next(errors) * unit, prepared.rotated).item() for unit in row] for row in units]
    for part, column in zip(parts, zip(*losses, strict=True), strict=True):
        part.factor = min(zip(column, book.scale_factors, strict=True))[1]


def _sample(part: _Part, book: Codebook) -> torch.Tensor:
    """At most `_SCALE_ROWS` rows of a rotated weight, evenly spaced; whole groups of rows that are coded together."""
    together = book.rows_together
    groups = max(len(part.weight) // together, 1)  # without a last group that zeros complete
    count = min(max(_SCALE_ROWS // together, 1), groups)
    chosen = (torch.arange(count, device=part.rotated.device) * (groups / count)).long()
    return part.rotated.reshape(-1, together, part.rotated.shape[1])[chosen].flatten(0, 1)


def _ratio(error: torch.Tensor, weight: torch.Tensor, hessian: torch.Tensor) -> float:
    total = proxy_loss(weight, hessian).item()
    return proxy_loss(error, hessian).item() / total if total > 0 else math.nan


def _warn_of_storage(part: _Part, sv: torch.Tensor, energy: torch.Tensor, error: torch.Tensor) -> None:
    warn_of_storage(part.name, part.stored_as, sv, energy, error.item(), part.weight.square().sum().item())


def warn_of_storage(
    name: str, dtype: torch.dtype, sv: torch.Tensor, energy: torch.Tensor, error: float, total: float
) -> None:
    """Warn if storing sv in the model's dtype adds a noticeable error: mostly subnormal numbers in float16.

    Args:
        name: of the module.
        dtype: in which sv will be stored.
        sv: float32 [m].
        energy: float32 [m], the sum of squares of each row that sv scales: of Q_out Ŵ Q_inᵀ diag(su).
        error: the squared error of the quantized weight.
        total: the sum of squares of the weight.
    """
    added = ((sv.to(dtype).float() - sv).double().square() * energy).sum().item()
    if not added <= _STORAGE_SHARE * error:
        logger.warning(
            "%s: its scales sv (%.1e to %.1e) leave the normal numbers of %s (%.1e to %.1e), in which they are stored: the "
            "relative error of the weight grows from %.2g to %.2g. Load the model in bfloat16 or float32",
            name,
            sv[sv != 0].abs().min().item(),
            sv.abs().max().item(),
            str(dtype).removeprefix("torch."),
            torch.finfo(dtype).tiny,
            torch.finfo(dtype).max,
            error / total,
            (error + added) / total,
        )
