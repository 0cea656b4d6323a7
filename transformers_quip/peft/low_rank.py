"""The best approximation of a matrix by two thin factors, in the metric of a Hessian or without one."""

from __future__ import annotations

import torch

# The first multiple of the mean diagonal that is added to a Hessian without a Cholesky factor, and the factor to the next.
_FIRST_DAMPING, _MORE = 1e-10, 10.0
# Columns beyond the rank, for the randomized decomposition.
_OVERSAMPLING = 16


@torch.no_grad()
def low_rank(
    residual: torch.Tensor, rank: int, hessian: torch.Tensor | None = None, niter: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors B, A of rank r that minimise tr((R - BA) H (R - BA)ᵀ), which is ‖(R - BA) H^½‖².

    Let U hold the first r left singular vectors of R S, where S Sᵀ = H. The minimum is at BA = U Uᵀ R, because
    U Uᵀ (R S) is the best approximation of R S by rank r (Eckart and Young). No inverse of H is needed, so that H may be
    singular. Without H this is the truncated singular value decomposition of R, as in LoftQ (arXiv 2310.08659) and LQ-LoRA;
    with H it is EoRA (arXiv 2410.21271). The singular values are shared out evenly between B and A.

    Args:
        residual: R [m, n], floating point.
        rank: r; a smaller side of R limits it, and the factors are completed by zeros.
        hessian: H [n, n], symmetric, positive semidefinite; None: the identity.
        niter: power iterations of a randomized decomposition, which is faster for large layers; None: an exact one.

    Returns:
        B [m, r], A [r, n], in the dtype of R, which is float32 at least.
    """
    residual = residual if residual.dtype == torch.float64 else residual.float()
    scaled = residual if hessian is None else residual @ _square_root(hessian).to(residual)
    count = min(rank, *residual.shape)
    left = _left_vectors(scaled, count, niter)
    inner, values, right = torch.linalg.svd(left.T @ residual, full_matrices=False)
    root = values.sqrt()
    b, a = left @ inner * root, root[:, None] * right
    more = rank - count
    return torch.nn.functional.pad(b, (0, more)), torch.nn.functional.pad(a, (0, 0, 0, more))


def _left_vectors(matrix: torch.Tensor, count: int, niter: int | None) -> torch.Tensor:
    """The first left singular vectors [m, count] of a matrix [m, n], exactly or approximately."""
    if niter is not None:
        width = min(count + _OVERSAMPLING, *matrix.shape)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return torch.svd_lowrank(matrix, q=width, niter=niter)[0][:, :count]
    return torch.linalg.svd(matrix, full_matrices=False).U[:, :count]


def _square_root(hessian: torch.Tensor) -> torch.Tensor:
    """S with S Sᵀ = H, lower triangular, in float64. As little as is needed is added to the diagonal of a singular H."""
    hessian = hessian.double()
    mean = hessian.diagonal().mean()
    identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    damping = 0.0
    while True:
        factor, failed = torch.linalg.cholesky_ex(hessian + damping * mean * identity)
        if not failed:
            return factor
        if damping > 1:
            raise ValueError("the Hessian is not positive semidefinite: its activations are NaN, Inf or zero")
        damping = damping * _MORE or _FIRST_DAMPING
