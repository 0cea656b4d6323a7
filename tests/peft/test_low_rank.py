"""The best factors, against the singular value decomposition in float64 and EoRA's formula with H^½ and H^-½."""

from __future__ import annotations

import pytest
import torch

from transformers_quip.peft.low_rank import low_rank

GENERATOR = torch.Generator().manual_seed(3)


def matrix(rows, columns):
    return torch.randn(rows, columns, generator=GENERATOR, dtype=torch.float64)


def hessian(size, rank=None):
    """E[x xᵀ] with eigenvalues over four powers of ten, of this rank."""
    x = matrix(rank or 3 * size, size) * torch.logspace(0, -2, size, dtype=torch.float64)
    return x.T @ x / len(x)


def loss(residual, h):
    return torch.einsum("ij,jk,ik->", residual, h, residual).item()


@pytest.mark.parametrize("shape", [(20, 33), (33, 20), (24, 24)])
@pytest.mark.parametrize("rank", [1, 4, 20])
def test_without_a_hessian_it_is_the_truncated_decomposition(shape, rank):
    residual = matrix(*shape)
    u, s, v = torch.linalg.svd(residual, full_matrices=False)
    b, a = low_rank(residual, rank)
    torch.testing.assert_close(b @ a, u[:, :rank] * s[:rank] @ v[:rank])
    # evenly shared: BᵀB = A Aᵀ = diag of the singular values
    torch.testing.assert_close(b.T @ b, s[:rank].diag(), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(a @ a.T, s[:rank].diag(), atol=1e-9, rtol=1e-9)
    assert (residual - b @ a).square().sum().item() == pytest.approx(s[rank:].square().sum().item(), abs=1e-9)


@pytest.mark.parametrize("shape", [(20, 33), (33, 20)])
@pytest.mark.parametrize("rank", [1, 4])
def test_with_a_hessian_it_is_eora(shape, rank):
    residual, h = matrix(*shape), hessian(shape[1])
    values, vectors = torch.linalg.eigh(h)
    root, inverse = ((vectors * values**power) @ vectors.T for power in (0.5, -0.5))
    u, s, v = torch.linalg.svd(residual @ root, full_matrices=False)
    b, a = low_rank(residual, rank, h)
    torch.testing.assert_close(b @ a, u[:, :rank] * s[:rank] @ v[:rank] @ inverse, rtol=1e-6, atol=1e-8)
    assert loss(residual - b @ a, h) == pytest.approx(s[rank:].square().sum().item(), rel=1e-6)
    # no other pair of factors of that rank is better: not the decomposition without a metric, and not a step away
    plain = low_rank(residual, rank)
    assert loss(residual - b @ a, h) < 0.9 * loss(residual - plain[0] @ plain[1], h)
    for _ in range(20):
        near = (b + 1e-3 * matrix(*b.shape)) @ (a + 1e-3 * matrix(*a.shape))
        assert loss(residual - b @ a, h) < loss(residual - near, h)


def test_a_hessian_of_few_tokens_is_singular():
    """Five tokens: rank 5 repairs their outputs completely, and the factors stay finite."""
    residual, h = matrix(20, 33), hessian(33, rank=5)
    b, a = low_rank(residual.float(), 5, h.float())
    assert loss((residual - (b @ a).double()), h) < 1e-5 * loss(residual, h)
    assert b.isfinite().all()
    assert a.isfinite().all()


def test_a_rank_above_the_size_is_completed_by_zeros():
    residual = matrix(6, 9)
    b, a = low_rank(residual, 8)
    assert b.shape == (6, 8)
    assert a.shape == (8, 9)
    torch.testing.assert_close(b @ a, residual)
    assert not b[:, 6:].any()


def test_the_randomized_decomposition_is_nearly_as_good():
    residual, h = matrix(200, 150), hessian(150)
    exact, near = (low_rank(residual, 8, h, niter) for niter in (None, 4))
    lost = [loss(residual - b @ a, h) for b, a in (exact, near)]
    assert lost[0] <= lost[1] < 1.01 * lost[0]
    state = torch.get_rng_state()
    again = low_rank(residual, 8, h, 4)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x, y) for x, y in zip(near, again, strict=True))


def test_a_hessian_of_nan():
    with pytest.raises(ValueError, match="not positive semidefinite"):
        low_rank(matrix(4, 4), 2, torch.full((4, 4), float("nan")))
