"""The encoders of E8P and grids against all points, in Triton's interpreter. Run by test_gpu_interpreted.py."""

from __future__ import annotations

import pytest
import torch
from interpreted import kernels_are_asked_for  # noqa: F401 - a fixture for every test

from quip_kernels import nearest as tables
from quip_kernels.gpu import nearest as kernels
from tests import truth
from tests.no_sync import forbidden_synchronisation
from transformers_quip import codebooks
from transformers_quip.ops import backend
from transformers_quip.rounding import Problem, get, proxy_loss

ROWS = 37


def vectors(rows, columns, seed=1):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def squared_distances(x, points):
    return (x.double()[:, None] - points).square().sum(2)


def test_candidates_are_all_patterns_and_the_changes_of_those_of_norm_twelve():
    vectors, biases, about, ends = tables.candidates(torch.device("cpu"))
    flat = vectors.transpose(1, 2).reshape(-1, 8)
    real = biases > -1e9
    assert real.sum() == 256 + 3 * 29
    torch.testing.assert_close(biases[real], -flat[real].square().sum(1) / 2)
    # the points of one side, all signs as they are
    magnitudes = truth.e8p_table()[::256].float()[about[real].long() & 0xFF]
    assert torch.equal(flat[real].abs(), (magnitudes - 0.25).abs())
    changed = about[real] >> 8
    assert torch.equal((flat[real] < 0).sum(1), (changed > 0).int())
    assert all(end % tables.TOGETHER == 0 for end in ends)


@pytest.mark.parametrize("kind", ["gaussian", "far", "ties"])
def test_the_nearest_of_all_points(kind):
    x = {"gaussian": vectors(300, 8), "far": vectors(60, 8) * 4, "ties": (vectors(60, 8) * 4).round() / 4}[kind]
    codes, points = kernels.encode(x)
    table = truth.e8p_table()
    assert torch.equal(table[codes.long() & 0xFFFF].float(), points)
    least = torch.cat([squared_distances(part, table).amin(1) for part in x.split(50)])
    found = (x.double() - points).square().sum(1)
    # every coordinate is exact in float32; scores are rounded
    assert (found - least).max() <= 2e-6 * (1 + x.square().sum(1).max())
    if kind == "ties":
        assert torch.equal(found, least)
    assert kernels.encode(x[:0])[0].shape == (0,)


@pytest.mark.parametrize(("second", "scale"), [("e8", 1 / 2.04), ("e8p", 0.3)])
def test_the_second_stage_is_nearest_to_the_rest(second, scale):
    x = vectors(ROWS, 8)
    codes, points = kernels.encode(x, second, scale)
    bits, table = (8, truth.e8_table()) if second == "e8" else (16, truth.e8p_table())
    first = truth.e8p_table()[(codes >> bits).long() & 0xFFFF]
    chosen = table[codes.long() & ((1 << bits) - 1)]
    torch.testing.assert_close(points.double(), first + scale * chosen, rtol=1e-6, atol=1e-6)
    for rest, points_of_stage, all_points in ((x, first, truth.e8p_table()), ((x - first) / scale, chosen, table)):
        found = (rest.double() - points_of_stage).square().sum(1)
        assert (found - squared_distances(rest, all_points).amin(1)).max() < 1e-5


@pytest.mark.parametrize("name", ["e8p", "e8p-rvq3", "e8p-rvq4", "scalar2", "scalar8"])
def test_a_panel_is_the_loop_over_its_blocks(name, monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK_ROWS", 32)  # two programs
    book, columns = codebooks.get(name), 24
    target, base, feedback = vectors(ROWS, columns), vectors(ROWS, columns, 2), vectors(columns, columns, 3) / 8
    unit = book.gaussian_scale
    codes, points, delta = book.round_panel(target * unit, base * unit, feedback)
    assert codes.dtype == book.code_dtype
    assert torch.equal(delta, base * unit - points)
    stored = (
        truth.decode(**{"codes": book.store(codes)["codes"]}, columns=columns, codebook=name) if name[:3] != "e8p" else None
    )
    if stored is not None:
        assert torch.equal(stored.float(), points)
    size = book.block_size
    for begin in range(columns - size, -1, -size):
        end = begin + size
        x = target[:, begin:end] * unit + (delta[:, end:].double() @ feedback[end:, begin:end].double()).float()
        with backend.overridden(devices={"cpu": "reference"}):
            _, nearest = book.encode(x)
        found, least = ((x - near).square().sum(1) for near in (points[:, begin:end], nearest))
        assert (found - least).abs().max() < 1e-4 * unit


def test_panels_of_any_stride_and_of_a_width_without_a_kernel(monkeypatch):
    book, wide = codebooks.get("scalar3"), vectors(9, 24)
    arguments = (wide.T.contiguous().T[:, 8:], wide[:, 8:], torch.zeros(24, 24)[8:, 8:])
    with backend.overridden(devices={"cpu": "reference"}):
        wanted = book.round_panel(*arguments)
    assert all(torch.equal(*both) for both in zip(book.round_panel(*arguments), wanted, strict=True))
    monkeypatch.setattr(kernels, "round_scalar_panel", None)
    arguments = (vectors(3, 136), vectors(3, 136), torch.zeros(136, 136))
    assert book.round_panel(*arguments)[0].shape == (3, 136)


def test_numbers_that_are_not_finite_do_not_leave_the_tables():
    x = vectors(4, 8)
    x[1, 3], x[2] = float("nan"), float("inf")
    codes, points = kernels.encode(x)
    assert torch.equal(truth.e8p_table()[codes.long() & 0xFFFF].float()[[0, 3]], points[[0, 3]])


@pytest.mark.parametrize(("method", "name"), [("ldlq", "e8p"), ("ldlq", "scalar2"), ("quantease", "scalar2")])
def test_rounding_by_kernels_is_as_good(method, name):
    x = vectors(200, 32, 4).cumsum(1)
    hessian = x.T @ x / 200 + torch.eye(32) / 10
    book = codebooks.get(name)
    problem = Problem(vectors(24, 32) * book.gaussian_scale, hessian, book, sweeps=1)
    found = get(method).round(problem)
    with backend.overridden(devices={"cpu": "reference"}):
        wanted = get(method).round(problem)
    losses = [proxy_loss(problem.weight - one.points, hessian).item() for one in (found, wanted)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_a_sweep_by_kernels_reads_nothing():
    from transformers_quip.rounding.sequential import inverse_of_blocks, start, sweep

    book = codebooks.get("e8p")
    problem = Problem(vectors(8, 16), torch.eye(16) + 0.1, book)
    rounded, conditional = start(problem.weight, book), inverse_of_blocks(problem.hessian, 8)
    sweep(problem, conditional, rounded)  # makes the tables
    with forbidden_synchronisation():
        sweep(problem, conditional, rounded)
