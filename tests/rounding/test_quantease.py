"""QuantEase: the relaxed pass, and Hessians without a Cholesky factor."""

import pytest
import torch

from tests.problems import problem
from transformers_quip import codebooks, rounding
from transformers_quip.rounding import Problem, proxy_loss
from transformers_quip.rounding.quantease import relaxed


def test_a_relaxed_pass_is_coordinate_descent_without_a_codebook():
    error, hessian = problem(5, 30)
    wanted, exact = error.double().clone(), hessian.double()
    for k in reversed(range(30)):
        wanted[:, k] -= wanted @ exact[:, k] / exact[k, k]
    torch.testing.assert_close(relaxed(error.double(), exact), wanted, rtol=1e-9, atol=1e-9)
    assert proxy_loss(wanted, exact) < proxy_loss(error.double(), exact)


@pytest.mark.parametrize("book", ["scalar2", "e8p"])
def test_needs_no_cholesky_factor(book):
    book = codebooks.get(book)
    weight, hessian = problem(64, 64, tokens=20)  # of rank 20 but for the damping
    hessian -= 0.01 / 1.01 * hessian.diagonal().mean() * torch.eye(64)
    hessian -= 1e-3 * hessian.diagonal().mean() * torch.eye(64)
    weight = weight * book.gaussian_scale
    with pytest.raises(torch.linalg.LinAlgError):
        rounding.get("ldlq").round(Problem(weight, hessian, book, 0))
    losses = [
        proxy_loss(weight - rounding.get(name).round(Problem(weight, hessian, book, 10)).points, hessian).item()
        for name in ("quantease", "nearest")
    ]
    assert losses[0] < 0.5 * losses[1]


def test_relaxed_passes_find_better_points_than_plain_descent():
    book = codebooks.get("scalar2")
    weight, hessian = problem(256, 96, seed=4)
    losses = [
        proxy_loss(weight - rounding.get(name).round(Problem(weight, hessian, book, 30)).points, hessian).item()
        for name in ("quantease", "greedy")
    ]
    assert losses[0] < losses[1]
