"""The encoders of E8P and grids on a device, against all points and against the CPU."""

from __future__ import annotations

import pytest
import torch

from tests import truth
from tests.rehearsal import sized
from transformers_quip import codebooks
from transformers_quip.rounding import Problem, get, proxy_loss

pytestmark = pytest.mark.gpu


def vectors(rows, columns, seed=1):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def test_the_nearest_of_all_points(device):
    x, table = vectors(sized(5000, 64), 8), truth.e8p_table().to(device)
    codes, points = codebooks.get("e8p").encode(x.to(device))
    assert torch.equal(table[codes.long() & 0xFFFF].float(), points)
    x = x.to(device).double()
    least = torch.cat([(part[:, None] - table).square().sum(2).amin(1) for part in x.split(100)])
    assert ((x - points).square().sum(1) - least).max() < 1e-5


@pytest.mark.parametrize("name", ["e8p-rvq3", "e8p-rvq4"])
def test_second_stages(name, device):
    book, x = codebooks.get(name), vectors(sized(1000, 64), 8)
    codes, points = book.encode(x.to(device))
    torch.testing.assert_close(book.decode(book.store(codes[:, None]), 8), points)
    wanted = book.encode(x)[1]
    assert ((x - points.cpu()).square().mean() / (x - wanted).square().mean() - 1).abs() < 1e-3


@pytest.mark.parametrize("name", ["e8p", "e8p-rvq3", "e8p-rvq4", "scalar2"])
def test_rounding_is_as_good_as_on_the_cpu(name, device):
    """Several programs, and panels of two widths."""
    rows, columns = sized((1000, 520), (16, 136))
    x = vectors(2000, columns, 4).cumsum(1) / 8
    hessian, book = x.T @ x / len(x) + torch.eye(columns) / 10, codebooks.get(name)
    weight = vectors(rows, columns) * book.gaussian_scale
    losses = []
    for target in (torch.device("cpu"), device):
        problem = Problem(weight.to(target), hessian.to(target), book, sweeps=2)
        losses.append(proxy_loss(weight - get("ldlq").round(problem).points.cpu(), hessian).item())
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)
