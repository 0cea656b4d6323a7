"""Block LDLQ: adaptive rounding with linear feedback from the columns already rounded (QuIP# , arXiv 2402.04396)."""

from __future__ import annotations

import torch

from .base import Problem, Rounded, Rounding
from .sequential import diagonal_blocks, inverse_of_blocks, round_with_feedback, sweep


class LDLQ(Rounding):
    """Block LDLQ and sweeps of coordinate descent.

    With the block LDL decomposition H = 𝓛 D 𝓛ᵀ, the blocks are rounded from the last to the first, each after adding
    the feedback (W − Ŵ)_{>k} 𝓛_{>k,k}: of all linear feedbacks the one with the least expected proxy loss. For blocks of
    one column this is QuIP's LDLQ (arXiv 2307.13304, section 3), and the column updates of OPTQ. A sweep then visits
    every block again and rounds its conditional optimum Ŵ_k + (W − Ŵ) H_{:,k} H_{kk}⁻¹.
    """

    name = "ldlq"
    needs_hessian = True

    def round(self, problem: Problem) -> Rounded:
        """See [`Rounding.round`]."""
        hessian, size = problem.required_hessian, problem.codebook.block_size
        rounded = round_with_feedback(problem.weight, block_ldl(hessian, size), problem.codebook)
        conditional = inverse_of_blocks(hessian, size)
        for _ in range(problem.sweeps):
            if not sweep(problem, conditional, rounded):
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
    blocks = diagonal_blocks(cholesky, block_size)
    inverse = torch.linalg.solve_triangular(
        blocks, torch.eye(block_size, dtype=blocks.dtype, device=blocks.device).expand_as(blocks), upper=False
    )
    # Column block k of the factor, times the inverse of its own diagonal block.
    columns = cholesky.reshape(size, -1, block_size).transpose(0, 1) @ inverse
    return columns.transpose(0, 1).reshape(size, size).to(hessian.dtype)
