"""Block LDLQ: adaptive rounding with linear feedback from the columns already rounded (QuIP# , arXiv 2402.04396)."""

from __future__ import annotations

import torch

from ..codebooks import Codebook
from .base import Rounded, Rounding

# Columns rounded between two large matrix products; the result does not depend on it.
PANEL = 128


class LDLQ(Rounding):
    """Block LDLQ and sweeps of coordinate descent.

    With the block LDL decomposition H = 𝓛 D 𝓛ᵀ, the blocks are rounded from the last to the first, each after adding
    the feedback (W − Ŵ)_{>k} 𝓛_{>k,k}: of all linear feedbacks the one with the least expected proxy loss. A sweep then
    visits every block again and rounds its conditional optimum Ŵ_k + (W − Ŵ) H_{:,k} H_{kk}⁻¹.
    """

    name = "ldlq"
    needs_hessian = True

    def round(self, weight: torch.Tensor, hessian: torch.Tensor | None, codebook: Codebook, sweeps: int) -> Rounded:
        """See [`Rounding.round`]."""
        codes = torch.empty(codebook.codes_shape(*weight.shape), dtype=codebook.code_dtype, device=weight.device)
        points = torch.zeros_like(weight)
        feedback = block_ldl(hessian, codebook.block_size)
        for begin, end in _panels(weight.shape[1], codebook.block_size):
            panel = weight[:, begin:end]
            target = panel + (weight[:, end:] - points[:, end:]) @ feedback[end:, begin:end]
            part = slice(begin // codebook.block_size, end // codebook.block_size)
            codes[:, part], points[:, begin:end], _ = codebook.round_panel(target, panel, feedback[begin:end, begin:end])
        rounded = Rounded(codes, points)
        conditional = _inverse_of_blocks(hessian, codebook.block_size)
        for _ in range(sweeps):
            if not sweep(weight, hessian, conditional, codebook, rounded):
                break
        return rounded


def block_ldl(hessian: torch.Tensor, block_size: int) -> torch.Tensor:
    """The factor 𝓛 of H = 𝓛 D 𝓛ᵀ with D block diagonal.

    Args:
        hessian: [n, n], positive definite, n a multiple of `block_size`.
        block_size: size of the blocks.

    Returns:
        [n, n] of the dtype of `hessian`: block lower triangular with identity blocks on the diagonal. Computed in
        float64.

    Raises:
        torch.linalg.LinAlgError: if H is not positive definite.
    """
    size = hessian.shape[0]
    cholesky = torch.linalg.cholesky(hessian.double())
    blocks = _diagonal_blocks(cholesky, block_size)
    inverse = torch.linalg.solve_triangular(
        blocks, torch.eye(block_size, dtype=blocks.dtype, device=blocks.device).expand_as(blocks), upper=False
    )
    # Column block k of the factor, times the inverse of its own diagonal block.
    columns = cholesky.reshape(size, -1, block_size).transpose(0, 1) @ inverse
    return columns.transpose(0, 1).reshape(size, size).to(hessian.dtype)


def sweep(
    weight: torch.Tensor, hessian: torch.Tensor, conditional: torch.Tensor, codebook: Codebook, rounded: Rounded
) -> bool:
    """One pass of coordinate descent over all blocks, in place.

    Args:
        weight: float32 [m, n].
        hessian: float32 [n, n].
        conditional: float32 [n / block, block, block], the inverses of the diagonal blocks of H.
        codebook: of the codes.
        rounded: the current codes and points; replaced.

    Returns:
        Whether any code changed.
    """
    size, changed = codebook.block_size, False
    for begin, end in _panels(weight.shape[1], size):
        part = slice(begin // size, end // size)
        current = rounded.points[:, begin:end].contiguous()
        gradient = (weight - rounded.points) @ hessian[:, begin:end]
        target = current + _times_blocks(gradient, conditional[part])
        feedback = _times_blocks(hessian[begin:end, begin:end], conditional[part])
        codes, points, _ = codebook.round_panel(target, current, feedback)
        changed = changed or not torch.equal(codes, rounded.codes[:, part])
        rounded.codes[:, part], rounded.points[:, begin:end] = codes, points
    return changed


def _panels(columns: int, block_size: int) -> list[tuple[int, int]]:
    """Column ranges from the last to the first, each a multiple of the block size."""
    width = max(PANEL // block_size, 1) * block_size
    return [(begin, min(begin + width, columns)) for begin in reversed(range(0, columns, width))]


def _diagonal_blocks(matrix: torch.Tensor, block_size: int) -> torch.Tensor:
    count = matrix.shape[0] // block_size
    index = torch.arange(count, device=matrix.device)
    return matrix.reshape(count, block_size, count, block_size)[index, :, index, :]


def _inverse_of_blocks(hessian: torch.Tensor, block_size: int) -> torch.Tensor:
    return torch.linalg.inv(_diagonal_blocks(hessian, block_size).double()).to(hessian.dtype)


def _times_blocks(matrix: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """matrix [m, n] times a block diagonal matrix, given as blocks [n / block, block, block]."""
    count, size, _ = blocks.shape
    product = matrix.reshape(-1, count, size).transpose(0, 1) @ blocks
    return product.transpose(0, 1).reshape(matrix.shape)
