"""The scales of the lattice codebooks are the best for a Gaussian, and the errors there the known ones.

A few weights are searched for through every point, in float64; that the package finds the same error is what lets it count
on many weights. Of the uniform grids the error has a closed form, see `test_scalar.py`.
"""

import itertools

import pytest
import torch

from tests import truth
from transformers_quip import codebooks

TABLES = {
    "e8p": (truth.e8p_table,),
    "d4": (truth.d4_table,),
    "e8p-rvq3": (truth.e8p_table, truth.e8_table),
    "e8p-rvq4": (truth.e8p_table, truth.e8p_table),
}
# Measured on 2^21 weights and more (`benchmarks/codebooks.py`); of E8P and D4 also published so.
ERRORS = {"e8p": 0.0914, "d4": 0.1026, "e8p-rvq3": 0.0295, "e8p-rvq4": 0.00833}
# Multiples of the package's scales.
STEPS = (0.8, 0.85, 0.9, 0.95, 0.975, 1.0, 1.025, 1.05, 1.1, 1.15, 1.2)


def scaled(name, other):
    """The codebook with another scale for its second stage, where it has one."""
    book = codebooks.get(name)
    return book.with_residual_scale(book.residual_scale * other) if book.residual_scale else book


def error(book, scale, x):
    return (book.encode(scale * x)[1] / scale - x).square().mean(dtype=torch.float64).item()


def nearest(x, table):
    """The nearest point of each row of x: every distance is computed."""
    return table[(table.square().sum(1) / 2 - x @ table.T).argmin(1)]


@pytest.mark.parametrize("step", [0.9, 1.0, 1.2])
@pytest.mark.parametrize("name", TABLES)
def test_the_error_is_that_of_a_search_through_every_point(name, step):
    book = scaled(name, 2 - step)
    x = torch.randn(128, book.block_size, generator=torch.Generator().manual_seed(0)).double()
    scale, (first, *second) = book.gaussian_scale * step, TABLES[name]
    rest = scale * x - nearest(scale * x, first())
    if second:
        rest -= book.residual_scale * nearest(rest / book.residual_scale, second[0]())
    assert error(book, scale, x.float()) == pytest.approx((rest / scale).square().mean().item(), rel=1e-4)


@pytest.mark.parametrize("name", TABLES)
def test_within_one_percent_of_the_best_scales(name):
    book = codebooks.get(name)
    x = torch.randn((1 << 18) // book.block_size, book.block_size, generator=torch.Generator().manual_seed(1))
    steps = itertools.product(STEPS, STEPS if book.residual_scale else (1.0,))
    errors = {(step, other): error(scaled(name, other), book.gaussian_scale * step, x) for step, other in steps}
    best = min(errors, key=errors.get)
    assert errors[1.0, 1.0] <= 1.01 * errors[best]
    # The best lies within the grid: none is better beyond its ends.
    assert not {STEPS[0], STEPS[-1]} & set(best)


@pytest.mark.parametrize("name", TABLES)
def test_the_error_is_the_known_one(name):
    book = codebooks.get(name)
    x = torch.randn((1 << 21) // book.block_size, book.block_size, generator=torch.Generator().manual_seed(2))
    found = error(book, book.gaussian_scale, x)
    assert found == pytest.approx(ERRORS[name], rel=0.01)
    assert found > 4.0**-book.bits  # rate and distortion
