"""Second moments against float64 numpy."""

import numpy as np
import pytest
import torch

from transformers_quip.calibration import HessianAccumulator
from transformers_quip.calibration.precision import cpu_matmul_precision

# float32 sums over a chunk of thousands of tokens; TF32 products would be off by 1e-4, bfloat16 ones by 1e-3
TOLERANCE = 2e-6


def activations(*shape, seed=0, dtype=torch.float32):
    """Correlated columns of very different size, off their mean, as activations are."""
    generator = torch.Generator().manual_seed(seed)
    size = shape[-1]
    mixing = torch.randn(size, size, generator=generator) / size**0.5
    scale = torch.logspace(-2, 2, size)
    return ((torch.randn(*shape, generator=generator) @ mixing + 0.3) * scale).to(dtype)


def second_moment(x, y=None):
    x = x.double().reshape(-1, x.shape[-1]).numpy()
    y = x if y is None else y.double().reshape(-1, y.shape[-1]).numpy()
    return np.einsum("ti,tj->ij", x, y, optimize=True) / len(x)


def relative_error(value, truth):
    """Largest error, each entry relative to the root of its diagonal entries: |ΔH_ij| / sqrt(H_ii H_jj)."""
    size = np.sqrt(np.diagonal(truth))
    return np.max(np.abs(value.double().numpy() - truth) / np.outer(size, size))


# sizes around the width of a panel (256), tokens around the chunk (4096)
@pytest.mark.parametrize(("size", "tokens"), [(1, 3), (7, 100), (256, 50), (300, 5000), (520, 4096)])
def test_hessian_is_the_second_moment(size, tokens):
    x = activations(tokens, size)
    accumulator = HessianAccumulator(size)
    for part in (x[: tokens // 3], x[tokens // 3 :]):
        accumulator.add(part)
    hessian = accumulator.hessian()
    assert accumulator.tokens == tokens
    assert hessian.dtype == torch.float32
    assert torch.equal(hessian, hessian.T)
    assert relative_error(hessian, second_moment(x)) < TOLERANCE


def test_leading_dimensions_are_tokens():
    x = activations(3, 5, 2, 12)
    accumulator = HessianAccumulator(12)
    accumulator.add(x)
    assert accumulator.tokens == 30
    assert relative_error(accumulator.hessian(), second_moment(x)) < TOLERANCE


def test_many_small_batches_do_not_lose_precision():
    # 4000 additions to a sum 4000 times their size: float32 sums would be off by about 1e-5
    x = activations(4000, 1, 16)
    accumulator = HessianAccumulator(16)
    for batch in x:
        accumulator.add(batch)
    assert relative_error(accumulator.hessian(torch.float64), second_moment(x)) < 1e-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_inputs_of_other_dtypes(dtype):
    x = activations(2000, 300, dtype=dtype)
    accumulator = HessianAccumulator(300)
    accumulator.add(x)
    assert relative_error(accumulator.hessian(), second_moment(x)) < TOLERANCE


def test_the_users_matmul_precision_does_not_spoil_float32_products():
    x = activations(2000, 300)
    accumulator = HessianAccumulator(300)
    with cpu_matmul_precision("bf16"):
        accumulator.add(x)
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    assert relative_error(accumulator.hessian(), second_moment(x)) < TOLERANCE


def test_input_is_left_alone_and_needs_no_gradient():
    x = activations(10, 8).requires_grad_()
    before = x.detach().clone()
    accumulator = HessianAccumulator(8)
    accumulator.add(x)
    assert not accumulator.hessian().requires_grad
    assert torch.equal(x.detach(), before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_bad_activations_name_the_module(value):
    x = activations(10, 8)
    x[4, 3] = value
    accumulator = HessianAccumulator(8, name="model.layers.0.mlp.up_proj")
    accumulator.add(x)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.up_proj hold NaN or Inf in column 3"):
        accumulator.hessian()


def test_no_tokens_is_an_error():
    accumulator = HessianAccumulator(8, name="experts.3")
    accumulator.add(torch.empty(0, 8))
    with pytest.raises(ValueError, match=r"experts\.3"):
        accumulator.hessian()


@pytest.mark.parametrize("x", [torch.ones(4, 7), torch.ones(4, 8, dtype=torch.long)])
def test_wrong_inputs(x):
    with pytest.raises(ValueError, match=r"must be floating point \[\.\.\., 8\]"):
        HessianAccumulator(8).add(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_around_it_changes_nothing(dtype):
    """The sums, rounded to bfloat16, would make a Hessian that is not positive definite."""
    x = activations(3000, 64, seed=4).to(dtype)
    outside, inside = HessianAccumulator(64), HessianAccumulator(64)
    outside.add(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside.add(x)
    assert torch.equal(inside.hessian(), outside.hessian())
