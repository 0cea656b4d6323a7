"""Weights of four bits against the points of the codebooks, and products with them against those with codes."""

import pytest
import torch

from quip_kernels import cpu, cpu_library, cpu_nibbles
from quip_kernels import cpu_linear as kernels
from tests import truth
from tests.levels import processor_has

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason="the CPU library was not compiled")

LEVELS = range(len(cpu_library.LEVELS))
SHAPES = [(16, 1), (32, 8), (16, 31), (48, 72), (16, 576), (160, 1000), (16, 4099)]


def weights_of(nibbles, factor, offset):
    """[m, 4·k] by the description of the form: factor · q + offset."""
    low, high = nibbles.int() & 15, nibbles.int() >> 4 & 15
    rows = torch.cat([low, high], dim=2)  # [tile, k, row, i]
    return rows.permute(0, 2, 1, 3).flatten(2).flatten(0, 1).double() * factor + offset


def every(count, dtype):
    return torch.arange(count, dtype=torch.int32).to(dtype)


def test_expanded_codes_are_the_points():
    codes = every(65536, torch.int16).reshape(256, 256)
    nibbles = cpu_nibbles.expand(codes)
    assert nibbles.shape == (16, 512, 8, 4)
    assert torch.equal(weights_of(nibbles, 0.5, -2.75), truth.e8p_table().reshape(256, 2048))
    assert torch.equal(cpu_nibbles.collapse(nibbles), codes)
    codes = every(256, torch.uint8).reshape(16, 16)
    nibbles = cpu_nibbles.expand(codes)
    assert torch.equal(weights_of(nibbles, 0.5, -2.0), truth.e8_table().reshape(16, 128))
    assert torch.equal(cpu_nibbles.collapse(nibbles), codes)


@pytest.mark.parametrize("threads", [1, 3])
def test_expanding_does_not_depend_on_threads(threads):
    codes = truth.random_linear(320, 4000)["codes"]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        nibbles = cpu_nibbles.expand(codes)
        assert torch.equal(weights_of(nibbles, 0.5, -2.75), truth.decode(codes, 4000))
        assert torch.equal(cpu_nibbles.collapse(nibbles), codes)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("planes", kernels.PLANES)
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_products_are_those_of_the_codes_to_the_bit(m, n, planes, level):
    codes = truth.random_linear(m, n, seed=m + n)["codes"]
    nibbles = cpu_nibbles.expand(codes)
    for vectors in (1, 2, 3, 4, 9):
        x = torch.randn(vectors, n, generator=torch.Generator().manual_seed(n))
        y = kernels.linear(x, nibbles, None, None, None, None, None, planes, level=processor_has(level))
        assert torch.equal(y, kernels.linear(x, codes, None, None, None, None, None, planes, level=0))


@pytest.mark.parametrize("level", LEVELS)
def test_products_with_the_largest_sums(level):
    """All weights 11/4 and all digits of a vector alike, of either sign: no sum of 16 bits overflows."""
    point = (truth.e8p_table().sum(1)).argmax()
    largest = (truth.e8p_table() == 2.75).all(1)
    assert not largest.any()  # the codebook has no such point: the one with the largest sum
    codes = torch.full((16, 512), int(point), dtype=torch.int32).to(torch.int16)
    nibbles = cpu_nibbles.expand(codes)
    for sign in (1, -1):
        x = torch.full((1, 4096), sign * 3.0)
        y = kernels.linear(x, nibbles, None, None, None, None, None, 1, level=processor_has(level))
        torch.testing.assert_close(y.double(), x.double() @ truth.decode(codes, 4096).T)
    # nibbles that no code has, as large as they can be: q = 15, so that every product is at its limit
    nibbles.fill_(255)
    y = kernels.linear(-x, nibbles, None, None, None, None, None, 1, level=level)
    torch.testing.assert_close(y, torch.full((1, 16), 4096 * 3.0 * (15 / 2 - 2.75)))
    with pytest.raises(ValueError, match="not points of the codebook"):
        cpu_nibbles.collapse(nibbles)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("codebook", ["e8p-rvq3", "e8p-rvq4"])
@pytest.mark.parametrize("form", [(True, True), (True, False), (False, True)])
def test_two_stages_in_any_form(codebook, form, level):
    parts = truth.random_linear(48, 200, codebook=codebook)
    stages = (parts["codes"], parts["codes_residual"])
    mixed = [cpu_nibbles.expand(codes) if wanted else codes for codes, wanted in zip(stages, form, strict=True)]
    x = torch.randn(3, 200)
    for planes in kernels.PLANES:
        y, expected = (
            kernels.linear(
                x, first, None, None, None, None, None, planes, None, processor_has(level), second, residual_scale=0.3
            )
            for first, second in (mixed, stages)
        )
        assert torch.equal(y, expected)
    for dtype in kernels.DTYPES:
        w, expected = (kernels.decode(first, 200, dtype, level, None, second, 0.3) for first, second in (mixed, stages))
        assert torch.equal(w, expected)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("columns", [1, 8, 17, 40, 75, 2200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_decode(columns, dtype, level):
    codes = truth.random_linear(32, columns)["codes"]
    weight = kernels.decode(cpu_nibbles.expand(codes), columns, dtype, processor_has(level))
    assert weight.dtype == dtype
    assert torch.equal(weight.double(), truth.decode(codes, columns))


def test_refused():
    with pytest.raises(ValueError, match="m a multiple of 16"):
        cpu_nibbles.expand(torch.zeros(24, 2, dtype=torch.int16))
    with pytest.raises(ValueError, match="must be int16 or uint8"):
        cpu_nibbles.expand(torch.zeros(16, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match="nibbles must be uint8 or int8"):
        cpu_nibbles.collapse(torch.zeros(16, 2, dtype=torch.int16))
    nibbles = cpu_nibbles.expand(torch.zeros(16, 2, dtype=torch.int16))
    with pytest.raises(ValueError, match="codes for 24 inputs"):
        kernels.linear(torch.zeros(1, 24), nibbles, None, None, None, None, None)
    with pytest.raises(ValueError, match="codes for 16 inputs"):  # nibbles of E8 as a first stage
        kernels.linear(torch.zeros(1, 16), nibbles.to(torch.int8), None, None, None, None, None)
    with pytest.raises(ValueError, match="codes_residual must be"):
        kernels.decode(nibbles, 16, torch.float32, codes_residual=torch.zeros(32, 2, dtype=torch.int16))
