"""What holds for every rounding method with every codebook that it works with."""

import pytest
import torch

from tests.problems import problem
from transformers_quip import codebooks, rounding
from transformers_quip.rounding import Problem, proxy_loss

BOOKS = ("scalar2", "scalar4", "d4", "e8p", "e8p-rvq3")
PAIRS = [
    (method, book) for method in rounding.names() for book in BOOKS if rounding.get(method).works_with(codebooks.get(book))
]
WITH_HESSIAN = [(method, book) for method, book in PAIRS if method in ("ldlq", "ldlq-rg", "greedy", "quantease")]


def setting(book, rows=24, columns=136):
    book = codebooks.get(book)
    weight, hessian = problem(rows, columns, seed=7)
    return weight * book.gaussian_scale, hessian, book


@pytest.mark.parametrize(("method", "book"), PAIRS)
def test_codes_decode_to_the_points(method, book):
    weight, hessian, book = setting(book)
    codes, points = rounding.get(method).round(Problem(weight, hessian, book, 2, seed=3))
    decoded = book.decode(book.store(codes), weight.shape[1])
    torch.testing.assert_close(decoded, points, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("method", "book"), WITH_HESSIAN)
def test_the_hessian_is_put_to_use(method, book):
    weight, hessian, book = setting(book, rows=96)
    losses = [
        proxy_loss(weight - rounding.get(name).round(Problem(weight, hessian, book, 5)).points, hessian).item()
        for name in (method, "nearest")
    ]
    assert losses[0] < 0.8 * losses[1]


@pytest.mark.parametrize(("method", "book"), WITH_HESSIAN)
def test_rows_are_independent(method, book):
    weight, hessian, book = setting(book)
    whole = rounding.get(method).round(Problem(weight, hessian, book, 2))
    half = rounding.get(method).round(Problem(weight[::2].contiguous(), hessian, book, 2))
    # Sums of another shape round differently, and may decide a tie.
    assert (whole.points[::2] == half.points).all(1).float().mean() > 0.8


@pytest.mark.parametrize("method", ["ldlq", "ldlq-rg", "greedy", "quantease"])
def test_more_sweeps_never_raise_the_loss_of_a_row(method):
    # Of blocks of several weights, the nearest point need not be the best one in the metric of H.
    weight, hessian, book = setting("scalar2")
    errors = [weight - rounding.get(method).round(Problem(weight, hessian, book, sweeps)).points for sweeps in (0, 1, 4)]
    losses = [((error.double() @ hessian.double()) * error).sum(1) for error in errors]
    slack = 1e-4 * losses[0]  # sweeps compute in float32
    assert (losses[1] <= losses[0] + slack).all()
    assert (losses[2] <= losses[1] + slack).all()


def test_methods_for_grids_of_single_weights_alone():
    for method in rounding.names():
        assert rounding.get(method).works_with(codebooks.get("scalar3"))
        assert rounding.get(method).works_with(codebooks.get("e8p")) == (method not in ("stochastic", "convex"))
