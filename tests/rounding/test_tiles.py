"""Rows that are coded together: tiles of 16x16 go through every rounding method as through a brute force in loops."""

import pytest
import torch

from tests.problems import problem
from tests.tiles import TILE, Tiles, nearest
from transformers_quip import rounding
from transformers_quip.codebooks import get
from transformers_quip.rounding import Problem, proxy_loss

BOOK = Tiles()


def test_blocks_are_tiles_row_by_row_and_back():
    matrix = torch.arange(48 * 32.0).reshape(48, 32)
    blocks = BOOK.to_blocks(matrix)
    assert blocks.shape == (3, 2, 256)
    for i in range(3):
        for j in range(2):
            tile = matrix[TILE * i : TILE * (i + 1), TILE * j : TILE * (j + 1)]
            assert blocks[i, j].tolist() == [value for row in tile.tolist() for value in row]
    assert torch.equal(BOOK.from_blocks(blocks), matrix)
    single = get("e8p")
    assert torch.equal(single.to_blocks(matrix), matrix.reshape(48, 4, 8))
    assert torch.equal(single.from_blocks(single.to_blocks(matrix)), matrix)


def test_nearest_tiles():
    weight, _ = problem(48, 64, seed=1)
    codes, points = rounding.get("nearest").round(Problem(weight, None, BOOK))
    assert codes.shape == (3, 4, 33)
    torch.testing.assert_close(points, nearest(weight))
    assert torch.equal(BOOK.decode(BOOK.store(codes), 64), points)


def naive_ldlq(weight, hessian, sweeps):
    """Column of tiles by column of tiles with full matrices, float64, tiles by loops."""
    weight, hessian = weight.double(), hessian.double()
    columns = [slice(k, k + TILE) for k in range(0, weight.shape[1], TILE)]
    lower = torch.linalg.cholesky(hessian)
    for part in columns:
        lower[:, part] = lower[:, part] @ torch.linalg.inv(lower[part, part])
    rounded = torch.zeros_like(weight)
    for part in reversed(columns):
        later = slice(part.stop, None)
        rounded[:, part] = nearest(weight[:, part] + (weight - rounded)[:, later] @ lower[later, part])
    for _ in range(sweeps):
        for part in reversed(columns):
            step = (weight - rounded) @ hessian[:, part] @ torch.linalg.inv(hessian[part, part])
            rounded[:, part] = nearest(rounded[:, part] + step)
    return rounded


@pytest.mark.parametrize("sweeps", [0, 2])
def test_ldlq_on_tiles_is_its_definition(sweeps):
    weight, hessian = problem(48, 160, seed=2)
    codes, points = rounding.get("ldlq").round(Problem(weight, hessian, BOOK, sweeps))
    wanted = naive_ldlq(weight, hessian, sweeps)
    same = (BOOK.to_blocks(points.double()) - BOOK.to_blocks(wanted)).abs().amax(-1) < 1e-6
    assert same.float().mean() > 0.85  # a tie within float32 rounding changes what follows in its rows of tiles
    loss, wanted_loss = (proxy_loss(weight - p.float(), hessian).item() for p in (points, wanted))
    assert loss == pytest.approx(wanted_loss, rel=0.01)
    assert torch.equal(BOOK.decode(BOOK.store(codes), 160), points)


@pytest.mark.parametrize("method", ["ldlq", "ldlq-rg", "greedy", "quantease"])
def test_every_method_with_feedback_is_better_than_the_nearest_tiles(method):
    weight, hessian = problem(32, 96, seed=3)
    codes, points = rounding.get(method).round(Problem(weight, hessian, BOOK, 4))
    assert torch.equal(BOOK.decode(BOOK.store(codes), 96), points)
    blind = rounding.get("nearest").round(Problem(weight, None, BOOK)).points
    assert proxy_loss(weight - points, hessian) < 0.8 * proxy_loss(weight - blind, hessian)


def test_quantease_keeps_the_best_pass_of_each_row_of_tiles():
    """More passes are never worse for any row of tiles, although single rows of weights may be."""
    weight, hessian = problem(64, 96, seed=4)
    losses = {}
    for sweeps in (0, 1, 2, 5):
        error = weight - rounding.get("quantease").round(Problem(weight, hessian, BOOK, sweeps)).points
        losses[sweeps] = ((error.double() @ hessian.double()) * error).sum(1).reshape(4, TILE).sum(1)
    for fewer, more in ((0, 1), (1, 2), (1, 5)):  # of six passes the third is relaxed, of three it is not
        assert (losses[more] <= losses[fewer] * (1 + 1e-5)).all()
    assert (losses[5] < losses[0]).any()


def test_incomplete_tiles_and_hessians_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"codes 16 rows and 16 columns together, so a weight of shape \[24, 32\]"):
        Problem(torch.zeros(24, 32), None, BOOK)
    with pytest.raises(ValueError, match=r"shape \[16, 40\] has incomplete blocks"):
        Problem(torch.zeros(16, 40), None, BOOK)
    with pytest.raises(ValueError, match=r"\[16, 32\] cannot have a Hessian of \[16, 16\]"):
        Problem(torch.zeros(16, 32), torch.eye(16), BOOK)
    with pytest.raises(ValueError, match=r"\[16, 32\] cannot have a Hessian of \[32, 32\]"):
        Problem(torch.zeros(16, 32), torch.eye(32), BOOK, hessian_out=torch.eye(32))
    with pytest.raises(ValueError, match="needs the Hessian of the inputs"):
        rounding.get("ldlq").round(Problem(torch.zeros(16, 32), None, BOOK))
