"""Uniform grids: nearest values against brute force, codes without unused bits, and the best steps for a Gaussian."""

import itertools
import math

import pytest
import torch

from quip_kernels import cpu as cpu_kernels
from tests import truth
from transformers_quip import codebooks
from transformers_quip.codebooks import scalar

NAMES = list(truth.SCALAR_BITS)


def normal_density(x):
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def normal_share(x):
    return (1 + math.erf(x / math.sqrt(2))) / 2


def gaussian_error(step, bits):
    """Mean squared error of the grid of this step on a unit Gaussian: the integrals over its cells, in closed form."""
    levels = [(k - (2**bits - 1) / 2) * step for k in range(2**bits)]
    bounds = [-math.inf, *((a + b) / 2 for a, b in itertools.pairwise(levels)), math.inf]
    error = 0.0
    for level, low, high in zip(levels, bounds, bounds[1:], strict=False):
        tails = [x * normal_density(x) if math.isfinite(x) else 0.0 for x in (low, high)]
        share = normal_share(high) - normal_share(low)
        first = normal_density(low) - normal_density(high)  # ∫ x
        error += (share + tails[0] - tails[1]) - 2 * level * first + level * level * share
    return error


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [0.5, 2.0, 90.0])
def test_nearest_value(name, scale):
    book = codebooks.get(name)
    levels = torch.arange(2 ** truth.SCALAR_BITS[name]).double() - (2 ** truth.SCALAR_BITS[name] - 1) / 2
    x = torch.randn(500, 1, generator=torch.Generator().manual_seed(0)) * scale
    codes, values = book.encode(x)
    assert (codes.shape, codes.dtype) == ((500,), torch.uint8)
    assert torch.equal(levels[codes.long()].float(), values[:, 0])
    assert torch.equal((x.double() - values).abs()[:, 0], (x.double() - levels).abs().min(1).values)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("columns", [24, 17, 1])
def test_store_and_decode(name, columns):
    """Against a row as one large integer, which is how `truth` reads it."""
    book, bits = codebooks.get(name), truth.SCALAR_BITS[name]
    codes = torch.randint(0, 2**bits, (7, columns), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    stored = book.store(codes)["codes"]
    grid = book.tensors(7, columns)["codes"]
    assert (tuple(stored.shape), stored.dtype) == (grid.shape, grid.dtype)
    assert grid.shape == (7, math.ceil(columns * bits / 8))
    assert stored.is_contiguous()
    wanted = codes.double() - (2**bits - 1) / 2
    assert torch.equal(truth.decode(stored, columns, name), wanted)
    for dtype in (torch.float64, torch.float32, torch.float16):
        weight = book.decode({"codes": stored}, columns, dtype)
        assert weight.dtype == dtype
        assert torch.equal(weight.double(), wanted)
    assert torch.equal(book.decode({"codes": stored}, columns, torch.bfloat16), wanted.bfloat16())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_step_is_the_best_for_a_gaussian(bits):
    step = scalar.GAUSSIAN_STEPS[bits]
    least = gaussian_error(step, bits)
    for change in (0.995, 1.005):
        assert gaussian_error(step * change, bits) > least
    book = codebooks.get(f"scalar{bits}")
    x = torch.randn(400_000, 1, generator=torch.Generator().manual_seed(0))
    measured = (x - book.encode(x / step)[1] * step).square().mean().item()
    assert measured == pytest.approx(least, rel=0.02)


def test_published_errors():
    """Max, Quantizing for minimum distortion (1960), table II."""
    published = {2: 0.1188, 3: 0.03744, 4: 0.01154}
    for bits, error in published.items():
        assert gaussian_error(scalar.GAUSSIAN_STEPS[bits], bits) == pytest.approx(error, rel=2e-3)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_quip_s_range_is_among_the_scales_that_are_tried(bits):
    book = codebooks.get(f"scalar{bits}")
    ranges = [(2**bits - 1) / 2 / (factor * book.gaussian_scale) for factor in book.scale_factors]
    assert min(abs(found - 2.4) for found in ranges) < 1e-3
    assert 1.0 in book.scale_factors


def test_half_integer_is_the_published_one():
    book = codebooks.get("half-integer")
    assert book.gaussian_scale == 2.97
    assert book.encode(torch.tensor([[-9.0], [0.1], [7.2]]))[1].flatten().tolist() == [-7.5, 0.5, 7.5]
    assert gaussian_error(1 / 2.97, 4) == pytest.approx(0.01154, rel=0.01)


def test_vectors_of_one():
    with pytest.raises(ValueError, match="scalar2 encodes vectors of 1 numbers"):
        codebooks.get("scalar2").encode(torch.zeros(3, 2))


@pytest.mark.parametrize("method", ["compiled", "generic"])
@pytest.mark.parametrize(("bits", "rows", "columns"), [(3, 9, 6), (2, 60, 1), (3, 60, 16), (4, 33, 41), (8, 5, 256)])
def test_panels_are_rounded_as_the_loop_says(method, bits, rows, columns, monkeypatch):
    if method == "compiled" and not cpu_kernels.is_available():
        pytest.skip("the CPU library was not compiled")
    if method == "generic":
        monkeypatch.setattr(cpu_kernels, "is_available", lambda: False)
    book, half = codebooks.get(f"scalar{bits}"), (2**bits - 1) / 2
    generator = torch.Generator().manual_seed(columns)
    target, base = (torch.randn(rows, columns, generator=generator) * 2 for _ in range(2))
    feedback = torch.randn(columns, columns, generator=generator) * 0.2 / max(columns / 40, 1)
    wanted = target.double().clone()
    for k in reversed(range(columns)):
        point = (wanted[:, k] + half).round().clamp(0, 2 * half) - half
        wanted[:, :k] += (base[:, k].double() - point)[:, None] * feedback[k, :k].double()
        wanted[:, k] = point
    codes, points, delta = book.round_panel(target, base, feedback)
    same = (points.double() == wanted).all(1)  # a tie within float32 rounding may fall either way
    assert same.float().mean() > 0.95
    torch.testing.assert_close(delta, base - points)
    assert torch.equal(codes.float() - half, points)
    assert torch.equal(book.decode(book.store(codes), columns), points)


def test_a_compiled_panel_of_wrong_size_is_refused():
    if not cpu_kernels.is_available():
        pytest.skip("the CPU library was not compiled")
    with pytest.raises(ValueError, match="1 to 256 columns"):
        cpu_kernels.scalar_round_panel(*torch.zeros(2, 1, 257), torch.zeros(257, 257), 3)
    with pytest.raises(ValueError, match="feedback has shape"):
        cpu_kernels.scalar_round_panel(*torch.zeros(2, 4, 8), torch.zeros(4, 4), 3)
