"""Greedy coordinate descent against its definition, in float64."""

import pytest
import torch

from tests.problems import problem
from transformers_quip import codebooks, rounding
from transformers_quip.rounding import Problem, proxy_loss
from transformers_quip.rounding.sequential import PANEL


def naive(weight, hessian, book, passes):
    weight, hessian = weight.double(), hessian.double()
    points = weight.clone()
    for _ in range(passes):
        for block in reversed(range(0, weight.shape[1], book.block_size)):
            part = slice(block, block + book.block_size)
            step = (weight - points) @ hessian[:, part] @ torch.linalg.inv(hessian[part, part])
            points[:, part] = book.encode((points[:, part] + step).float())[1].double()
    return points


@pytest.mark.parametrize("sweeps", [0, 2])
@pytest.mark.parametrize("book", ["scalar2", "e8p"])
def test_equals_the_definition(book, sweeps):
    book = codebooks.get(book)
    weight, hessian = problem(48, PANEL + 24, seed=1)
    weight = weight * book.gaussian_scale
    points = rounding.get("greedy").round(Problem(weight, hessian, book, sweeps)).points
    wanted = naive(weight, hessian, book, 1 + sweeps)
    assert (points.double() == wanted).all(1).float().mean() > 0.85  # ties, as in test_ldlq.py
    loss, wanted_loss = (proxy_loss(weight - p.float(), hessian).item() for p in (points, wanted))
    assert loss == pytest.approx(wanted_loss, rel=0.01)


def test_ends_where_no_single_change_helps():
    book = codebooks.get("scalar2")
    weight, hessian = problem(16, 40)
    points = rounding.get("greedy").round(Problem(weight, hessian, book, 100)).points.double()
    error, hessian = weight.double() - points, hessian.double()
    gradient = error @ hessian
    for value in (-1.5, -0.5, 0.5, 1.5):
        step = points - value  # what changing one coordinate adds to its error
        change = 2 * step * gradient + step.square() * hessian.diagonal()
        assert change.min() > -1e-5 * hessian.diagonal().mean()
