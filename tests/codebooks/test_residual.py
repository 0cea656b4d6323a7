"""E8P with a second stage: each stage exact against brute force, both paths, other scales, and the error on a Gaussian."""

import pytest
import torch

from quip_kernels import cpu as cpu_kernels
from tests import truth
from transformers_quip import codebooks
from transformers_quip.codebooks import e8, residual

NAMES = ["e8p-rvq3", "e8p-rvq4"]
METHODS = ["compiled", "pytorch"]


@pytest.fixture(params=METHODS)
def method(request, monkeypatch):
    if request.param == "compiled" and not cpu_kernels.is_available():
        pytest.skip("the CPU library was not compiled")
    if request.param == "pytorch":
        monkeypatch.setattr(cpu_kernels, "is_available", lambda: False)
    return request.param


def second_table(name):
    return truth.e8_table() if name == "e8p-rvq3" else truth.e8p_table()


def gaussian(rows, columns=8, scale=1.0, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale


def distances(x, table):
    """Of every x to its nearest point, float64."""
    return torch.cdist(x.double(), table).min(1).values


def test_e8_table_is_the_published_one():
    assert torch.equal(e8.points().double(), truth.e8_table())  # which has its checksum


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [0.2, 1.0, 3.0])
def test_each_stage_is_the_nearest_point(method, name, scale):
    book = codebooks.get(name)
    x = gaussian(150, scale=scale)
    codes, values = book.encode(x)
    first, second = book.store(codes).values()
    base = truth.decode(first[:, None], 8)
    torch.testing.assert_close((x.double() - base).norm(dim=1), distances(x, truth.e8p_table()), rtol=1e-6, atol=1e-9)
    rest = (x.double() - base) / book.residual_scale
    wanted = distances(rest, second_table(name))
    refined = truth.decode(first[:, None], 8, name, second[:, None])
    torch.testing.assert_close((x.double() - refined).norm(dim=1) / book.residual_scale, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(values.double(), refined, rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(not cpu_kernels.is_available(), reason="the CPU library was not compiled")
def test_compiled_search_of_e8_finds_every_point_and_the_nearest():
    """The second stage alone: first-stage codes of 0.75 everywhere are subtracted by hand."""
    book = codebooks.get("e8p-rvq3")
    table = truth.e8_table()
    for points in (table.float(), gaussian(4000, scale=0.7, seed=1), gaussian(4000, scale=2.0, seed=2)):
        # small enough beside 3/4 that the first stage always takes that point
        x = 0.75 + 0.05 * points
        codes, _ = cpu_kernels.e8p_encode(x.contiguous(), "e8", 0.05)
        first, second = book.store(codes).values()
        kept = first == 0
        assert kept.float().mean() > 0.9
        rest = (x.double() - 0.75) / 0.05
        found = (rest - table[second.long()]).norm(dim=1)
        torch.testing.assert_close(found[kept], distances(rest, table)[kept], rtol=1e-5, atol=2e-5)
    everything = cpu_kernels.e8p_encode((0.75 + 0.05 * table.float()).contiguous(), "e8", 0.05)[0]
    assert torch.equal(book.store(everything)["codes_residual"].long(), torch.arange(256))


@pytest.mark.parametrize("name", NAMES)
def test_round_panel_follows_its_definition(method, name):
    book = codebooks.get(name)
    generator = torch.Generator().manual_seed(3)
    target, base = torch.randn(2, 21, 40, generator=generator)
    feedback = torch.randn(40, 40, generator=generator) * 0.2
    codes, points, delta = book.round_panel(target, base, feedback)
    wanted, wanted_delta = torch.zeros(2, 21, 40, dtype=torch.float64)
    for k in reversed(range(5)):
        here, later = slice(8 * k, 8 * k + 8), slice(8 * k + 8, None)
        x = target[:, here].double() + wanted_delta[:, later] @ feedback[later, here].double()
        first = truth.e8p_table()[torch.cdist(x, truth.e8p_table()).argmin(1)]
        rest = (x - first) / book.residual_scale
        second = second_table(name)[torch.cdist(rest, second_table(name)).argmin(1)]
        wanted[:, here] = first + book.residual_scale * second
        wanted_delta[:, here] = base[:, here].double() - wanted[:, here]
    # A tie within float32 rounding may fall either way and changes what follows in its row.
    same = ((points - wanted).abs() < 1e-5).all(1)
    assert same.float().mean() > 0.9
    torch.testing.assert_close(delta[same].double(), wanted_delta[same], rtol=1e-5, atol=1e-5)
    wanted = truth.decode(**book.store(codes), columns=40, codebook=name)
    torch.testing.assert_close(points.double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_decode_is_the_formula_and_drops_the_completion(name, dtype):
    parts = truth.random_linear(50, 77, codebook=name)
    book = codebooks.get(name)
    assert {key: (grid.shape, grid.dtype) for key, grid in book.tensors(50, 77).items()} == {
        key: (parts[key].shape, parts[key].dtype) for key in ("codes", "codes_residual")
    }
    weight = book.decode(parts, 77, dtype)
    assert weight.dtype == dtype
    wanted = truth.decode(parts["codes"], 77, name, parts["codes_residual"])
    error = (weight.double() - wanted).abs()
    assert (error <= torch.finfo(dtype).eps / 2 * wanted.abs() + 4e-7 * (dtype != torch.float64) + 1e-15).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [0.25, -1.0])
def test_another_residual_scale(method, name, scale):
    spec = codebooks.spec(name, scale)
    book = codebooks.get(spec)
    assert (book.residual_scale, book.name) == (scale, spec)
    assert codebooks.get(spec) is book
    x = gaussian(100)
    codes, values = book.encode(x)
    first, second = book.store(codes).values()
    base = truth.decode(first[:, None], 8)
    refined = truth.decode(first[:, None], 8, f"{name}@{scale}", second[:, None])
    torch.testing.assert_close(values.double(), refined, rtol=1e-6, atol=1e-6)
    wanted = distances((x.double() - base) / scale, second_table(name)) * abs(scale)
    torch.testing.assert_close((x.double() - refined).norm(dim=1), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [0.0, float("nan"), float("inf")])
def test_a_residual_scale_that_cannot_work(scale):
    with pytest.raises(ValueError, match="must be a finite number other than 0"):
        codebooks.spec("e8p-rvq4", scale)


def test_a_residual_scale_in_a_name():
    own = codebooks.get("e8p-rvq4").residual_scale
    assert codebooks.spec("e8p-rvq4") == codebooks.spec("e8p-rvq4", own) == "e8p-rvq4"
    assert codebooks.get(f"e8p-rvq4@{own!r}").name == "e8p-rvq4"
    published = codebooks.spec("e8p-rvq4", 1 / 3.45)
    assert codebooks.get(published).residual_scale == 1 / 3.45  # no bit of it is lost in the name
    assert codebooks.get(published).with_residual_scale(own).name == "e8p-rvq4"
    with pytest.raises(ValueError, match="codebook 'e8p-rvq4@x': 'x' is not a residual scale"):
        codebooks.get("e8p-rvq4@x")
    with pytest.raises(ValueError, match="codebook='e9p' is not known"):
        codebooks.get("e9p@0.5")


def test_a_residual_scale_without_a_second_stage():
    with pytest.raises(ValueError, match="codebook 'e8p' has no second stage"):
        codebooks.spec("e8p", 0.5)


# Computed by benchmarks/codebooks.py with many more vectors.
ERRORS = {"e8p-rvq3": (0.0290, 0.0300), "e8p-rvq4": (0.0081, 0.0085)}


@pytest.mark.parametrize("name", NAMES)
def test_mean_squared_error_on_a_gaussian(name):
    book = codebooks.get(name)
    x = gaussian(50_000)
    _, values = book.encode(x * book.gaussian_scale)
    error = (x - values / book.gaussian_scale).square().mean().item()
    assert ERRORS[name][0] < error < ERRORS[name][1]
    assert error > 2 ** (-2 * book.bits)  # rate and distortion


def test_shapes_of_any_rank_and_none(method):
    book = codebooks.get("e8p-rvq4")
    codes, values = book.encode(torch.randn(3, 5, 8))
    assert (codes.shape, codes.dtype, values.shape) == ((3, 5), torch.int32, (3, 5, 8))
    codes, values = book.encode(torch.empty(0, 8))
    assert (codes.shape, values.shape) == ((0,), (0, 8))
    with pytest.raises(ValueError, match="e8p-rvq4 encodes vectors of 8 numbers"):
        book.encode(torch.randn(4, 7))


def test_published_residual_scales():
    assert residual.PUBLISHED_RESIDUAL_SCALES == {"e8p-rvq3": 1 / 2.04, "e8p-rvq4": 1 / 3.45}


def test_an_unknown_second_stage():
    with pytest.raises(ValueError, match="second='d4' must be one of None, 'e8', 'e8p'"):
        cpu_kernels.e8p_encode(torch.zeros(1, 8), "d4")
