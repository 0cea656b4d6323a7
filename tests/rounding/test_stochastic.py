"""Stochastic rounding: its choices, its expectation, its seed."""

import math

import pytest
import torch

from transformers_quip import codebooks, rounding
from transformers_quip.rounding import Problem


@pytest.mark.parametrize("bits", [2, 4])
def test_is_unbiased_and_takes_neighbours(bits):
    book, count = codebooks.get(f"scalar{bits}"), 40000
    top = (2**bits - 1) / 2
    wanted = torch.linspace(-top, top, 23)
    points = rounding.get("stochastic").round(Problem(wanted.expand(count, -1).contiguous(), None, book, seed=5)).points
    assert ((points - wanted).abs() < 1 + 1e-5).all()
    # Hoeffding: each choice lies within one unit; that any of the means is further off has probability below 1e-9.
    bound = math.sqrt(math.log(2 * len(wanted) / 1e-9) / (2 * count))
    assert (points.double().mean(0) - wanted).abs().max() < bound


def test_beyond_the_ends_there_is_the_end():
    book = codebooks.get("scalar2")
    points = (
        rounding.get("stochastic").round(Problem(torch.tensor([[9.0, -9.0, 2.5, -2.5]]).expand(50, -1), None, book)).points
    )
    assert torch.equal(points, torch.tensor([[1.5, -1.5, 1.5, -1.5]]).expand(50, -1))


def test_follows_the_seed():
    book, weight = codebooks.get("scalar3"), torch.randn(8, 40)
    first, again, other = (
        rounding.get("stochastic").round(Problem(weight, None, book, seed=seed)).codes for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
