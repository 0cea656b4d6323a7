"""Compiled layers of two stages against float64 formulas, for every instruction set."""

import pytest
import torch

from quip_kernels import cpu, cpu_library
from quip_kernels import cpu_linear as kernels
from tests import truth
from tests.levels import processor_has

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason="the CPU library was not compiled")

NAMES = ["e8p-rvq3", "e8p-rvq4"]
LEVELS = range(len(cpu_library.LEVELS))
# single rows and columns, incomplete codes, incomplete groups of 4 and 8 codes, tiles of 16 rows and less, long rows
SHAPES = [(1, 1), (3, 7), (16, 8), (17, 31), (16, 64), (33, 72), (5, 520), (31, 1000), (2, 4099)]
# Relative to the sizes that are summed; two and one planes round activations to 15 and 7 bits and a sign.
ACCURACY = {3: 1e-6, 2: 1e-4, 1: 2e-2}


def random_codes(name, m, n):
    parts = truth.random_linear(m, n, seed=m + n, codebook=name)
    return parts["codes"], parts["codes_residual"]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("planes", "vectors"), [(3, 1), (2, 1), (1, 1), (2, 2), (1, 3), (3, 3)])
@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_products(name, m, n, vectors, planes, level):
    codes, residual = random_codes(name, m, n)
    x = torch.randn(vectors, n, generator=torch.Generator().manual_seed(n))
    second = {"codes_residual": residual, "residual_scale": -0.3}
    y = kernels.linear(x, codes, None, None, None, None, None, planes, level=processor_has(level), **second)
    weight = truth.decode(codes, n, f"{name}@-0.3", residual)
    # a single row may cancel: the error is judged against the sizes that were summed
    size = x.double().norm(dim=1, keepdim=True) * weight.norm(dim=1)
    assert ((y.double() - x.double() @ weight.T).abs() / size).max() < ACCURACY[planes]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", NAMES)
def test_products_with_all_codes_and_every_coordinate(name, level):
    """Unit vectors read the decoded weight itself: all codes of the second stage, all eight coordinates."""
    count = 256 if name == "e8p-rvq3" else 65536
    residual = torch.arange(count, dtype=torch.int32).to(torch.uint8 if count == 256 else torch.int16).reshape(-1, 16)
    codes = random_codes(name, len(residual), 128)[0]
    second = {"codes_residual": residual, "residual_scale": 0.5}
    columns = kernels.linear(torch.eye(128), codes, None, None, None, None, None, level=processor_has(level), **second)
    # exact sums of multiples of 1/8, but for the rounding of the unit to 24 bits
    expected = truth.decode(codes, 128, f"{name}@0.5", residual)
    torch.testing.assert_close(columns.T.double(), expected, rtol=3e-7, atol=3e-7)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", NAMES)
def test_levels_and_batch_sizes_agree_to_the_bit(name, level):
    codes, residual = random_codes(name, 50, 300)
    x = torch.randn(7, 300)
    second = {"codes_residual": residual, "residual_scale": 1 / 3.45}
    for planes in kernels.PLANES:
        y = kernels.linear(x, codes, None, None, None, None, None, planes, level=processor_has(level), **second)
        assert torch.equal(y, kernels.linear(x, codes, None, None, None, None, None, planes, level=0, **second))
        for i in range(7):
            one = kernels.linear(x[i], codes, None, None, None, None, None, planes, level=level, **second)
            assert torch.equal(y[i], one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("m", "n"), [(12, 64), (96, 80), (40, 24)])
@pytest.mark.parametrize("name", NAMES)
def test_layer(name, m, n, dtype):
    parts = truth.random_linear(m, n, codebook=name, dtype=dtype)
    x = torch.randn(2, 3, n).to(dtype)
    second = {"codes_residual": parts["codes_residual"], "residual_scale": truth.RESIDUAL_SCALES[name]}
    arguments = (x, parts["codes"], parts["su"], parts["sv"], parts["bias"])
    transforms = [kernels.Transform([truth.hadamard(size)]) for size in (n, m)]
    y = kernels.linear(*arguments, *transforms, dtype=torch.float32, **second)
    bias = parts.pop("bias")
    expected = x.double() @ truth.dense_weight(**parts, codebook=name).T + bias.double()
    assert ((y.double() - expected).norm() / expected.norm()).item() < 2e-6


@pytest.mark.parametrize("columns", [1, 8, 17, 75, 2100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_decode(name, columns, dtype):
    codes, residual = random_codes(name, 37, columns)
    weight = kernels.decode(codes, columns, dtype, codes_residual=residual, residual_scale=0.29)
    assert weight.dtype == dtype
    expected = truth.decode(codes, columns, f"{name}@0.29", residual)
    error = (weight.double() - expected).abs()
    assert (error <= torch.finfo(dtype).eps / 2 * expected.abs() + 4e-7).all()
    out = torch.empty(37, columns, dtype=dtype)
    again = kernels.decode(codes, columns, dtype, out=out, codes_residual=residual, residual_scale=0.29)
    assert again is out
    assert torch.equal(out, weight)


@pytest.mark.parametrize(
    "residual",
    [
        torch.zeros(40, 12, dtype=torch.int32),
        torch.zeros(40, 11, dtype=torch.uint8),
        torch.zeros(39, 12, dtype=torch.int16),
    ],
)
def test_refused(residual):
    codes = truth.random_linear(40, 96)["codes"]
    with pytest.raises(ValueError, match=r"codes_residual must be int16 \(E8P\) or uint8 \(E8\) \[40, 12\]"):
        kernels.linear(torch.zeros(2, 96), codes, None, None, None, None, None, codes_residual=residual)
    with pytest.raises(ValueError, match="codes_residual must be int16"):
        kernels.decode(codes, 96, torch.float32, codes_residual=residual)
