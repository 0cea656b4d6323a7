"""The two loops of all sequential methods: rounding with linear feedback, and coordinate descent.

Both go through the columns from the last to the first, in panels: within a panel the codebook's own loop runs
([`Codebook.round_panel`]), between panels one large matrix product. The result does not depend on the panels.
"""

from __future__ import annotations

import torch

from ..codebooks import Codebook
from ..codebooks.base import PANEL
from .base import Problem, Rounded


def round_with_feedback(
    weight: torch.Tensor, feedback: torch.Tensor, codebook: Codebook, offset: torch.Tensor | None = None
) -> Rounded:
    """Round every block k of columns after adding (W − Ŵ)_{>k} F_{>k,k}, the errors of the columns rounded before it.

    Args:
        weight: float32 [m, n].
        feedback: float32 [n, n]; only blocks below the diagonal are read.
        codebook: the codebook of the points to choose from.
        offset: float32 [m, n], added before rounding but not counted as an error (a dither).
    """
    codes = torch.empty(codebook.codes_shape(*weight.shape), dtype=codebook.code_dtype, device=weight.device)
    points = torch.zeros_like(weight)
    for begin, end in _panels(weight.shape[1], codebook.block_size):
        panel = weight[:, begin:end]
        target = panel + (weight[:, end:] - points[:, end:]) @ feedback[end:, begin:end]
        if offset is not None:
            target += offset[:, begin:end]
        part = slice(begin // codebook.block_size, end // codebook.block_size)
        codes[:, part], points[:, begin:end], _ = codebook.round_panel(target, panel, feedback[begin:end, begin:end])
    return Rounded(codes, points)


def start(weight: torch.Tensor, codebook: Codebook) -> Rounded:
    """The start of coordinate descent, before any rounding: Ŵ = W, and codes without a meaning."""
    codes = torch.zeros(codebook.codes_shape(*weight.shape), dtype=codebook.code_dtype, device=weight.device)
    return Rounded(codes, weight.clone())


def sweep(
    problem: Problem, conditional: torch.Tensor, rounded: Rounded, feedback: list[torch.Tensor] | None = None
) -> torch.Tensor:
    """One pass of coordinate descent, in place: every block k to the point nearest to its conditional optimum.

    That is Ŵ_k + (W − Ŵ) H_{:,k} H_{kk}⁻¹, for the other blocks as they are at that moment.

    Args:
        problem: weight, Hessian and codebook.
        conditional: float32 [n / block, block, block], see [`inverse_of_blocks`].
        rounded: the current codes and points; replaced.
        feedback: the result of [`sweep_feedback`], if several weights with one Hessian are swept.

    Returns:
        Whether any code changed, a scalar on the device of the weight, which the host need not wait for.
    """
    weight, hessian, codebook = problem.weight, problem.required_hessian, problem.codebook
    size, changed = codebook.block_size, torch.zeros((), dtype=torch.bool, device=weight.device)
    feedback = sweep_feedback(hessian, conditional, size) if feedback is None else feedback
    for (begin, end), own in zip(_panels(weight.shape[1], size), feedback, strict=True):
        part = slice(begin // size, end // size)
        current = rounded.points[:, begin:end].contiguous()
        gradient = (weight - rounded.points) @ hessian[:, begin:end]
        target = current + _times_blocks(gradient, conditional[part])
        codes, points, _ = codebook.round_panel(target, current, own)
        changed |= (codes != rounded.codes[:, part]).any()
        rounded.codes[:, part], rounded.points[:, begin:end] = codes, points
    return changed


def sweep_feedback(hessian: torch.Tensor, conditional: torch.Tensor, block_size: int) -> list[torch.Tensor]:
    """The factors of errors inside each panel of a [`sweep`], in the order of the panels: H_{jk} H_{kk}⁻¹."""
    return [
        _times_blocks(hessian[begin:end, begin:end], conditional[begin // block_size : end // block_size])
        for begin, end in _panels(len(hessian), block_size)
    ]


def inverse_of_blocks(hessian: torch.Tensor, block_size: int) -> torch.Tensor:
    """The inverses of the diagonal blocks of H: [n / block, block, block] in its dtype, computed in float64."""
    return torch.linalg.inv(diagonal_blocks(hessian, block_size).double()).to(hessian.dtype)


def diagonal_blocks(matrix: torch.Tensor, block_size: int) -> torch.Tensor:
    """The diagonal blocks of a matrix [n, n]: [n / block, block, block]."""
    count = matrix.shape[0] // block_size
    index = torch.arange(count, device=matrix.device)
    return matrix.reshape(count, block_size, count, block_size)[index, :, index, :]


def _panels(columns: int, block_size: int) -> list[tuple[int, int]]:
    """Column ranges from the last to the first, each a multiple of the block size."""
    width = max(PANEL // block_size, 1) * block_size
    return [(begin, min(begin + width, columns)) for begin in reversed(range(0, columns, width))]


def _times_blocks(matrix: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """matrix [m, n] times a block diagonal matrix, given as blocks [n / block, block, block]."""
    count, size, _ = blocks.shape
    if size == 1:
        return matrix * blocks.reshape(count)
    product = matrix.reshape(-1, count, size).transpose(0, 1) @ blocks
    return product.transpose(0, 1).reshape(matrix.shape)
