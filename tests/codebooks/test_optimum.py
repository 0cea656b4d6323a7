"""The scales of the lattice codebooks are the best for a Gaussian: against searches through every point, in float64.

Of the uniform grids the error has a closed form, see `test_scalar.py`.
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
# Around the scales that the package has: multiples of it.
STEPS = (0.85, 0.92, 0.96, 1.0, 1.04, 1.08, 1.17)


def gaussian(weights, size, seed=0):
    return torch.randn(weights // size, size, generator=torch.Generator().manual_seed(seed))


def nearest(x, table):
    """The nearest point of each row of x: every distance is computed."""
    norms = table.square().sum(1) / 2
    return torch.cat([table[(norms - part @ table.T).argmin(1)] for part in x.split(64)])


@pytest.mark.parametrize("name", TABLES)
def test_within_one_percent_of_the_best_scales(name):
    book, (first, *second) = codebooks.get(name), TABLES[name]
    x = gaussian(4096 if second else 16384, book.block_size).double()
    errors = {}
    for step in STEPS:
        scale = book.gaussian_scale * step
        rest = scale * x - nearest(scale * x, first())
        if not second:
            errors[step, 1.0] = (rest / scale).square().mean().item()
        for other in STEPS if second else ():
            unit = book.residual_scale * other
            left = rest - unit * nearest(rest / unit, second[0]())
            errors[step, other] = (left / scale).square().mean().item()
    assert errors[1.0, 1.0] <= 1.01 * min(errors.values())
    # The minimum lies within the grid, so that no better scale is beyond its ends.
    best = min(errors, key=errors.get)
    assert not {STEPS[0], STEPS[-1]} & set(best[: 1 + len(second)])
    points = book.encode((book.gaussian_scale * x).float())[1].double()
    assert (points / book.gaussian_scale - x).square().mean().item() == pytest.approx(errors[1.0, 1.0], rel=1e-4)


@pytest.mark.parametrize("name", TABLES)
def test_the_error_is_the_known_one(name):
    book = codebooks.get(name)
    x = gaussian(1 << 21, book.block_size, seed=1)
    error = (book.encode(book.gaussian_scale * x)[1] / book.gaussian_scale - x).square().mean().item()
    assert error == pytest.approx(ERRORS[name], rel=0.01)
    assert error > 4.0**-book.bits  # rate and distortion


@pytest.mark.slow
@pytest.mark.parametrize("name", ["e8p-rvq3", "e8p-rvq4"])
def test_no_pair_of_scales_is_better_on_a_finer_grid(name):
    book = codebooks.get(name)
    x = gaussian(1 << 20, 8, seed=2)
    steps = [0.8 + 0.025 * i for i in range(17)]

    def error(step, other):
        scale, pair = book.gaussian_scale * step, codebooks.get(name, book.residual_scale * other)
        return (pair.encode(scale * x)[1] / scale - x).square().mean().item()

    assert error(1.0, 1.0) <= 1.01 * min(error(*pair) for pair in itertools.product(steps, steps))
