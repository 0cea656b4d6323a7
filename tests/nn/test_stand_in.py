"""The stand-in for the weight: metadata yes, values no."""

import pytest
import torch
from torch import nn

from transformers_quip import QuipLinear


@pytest.fixture
def module():
    return QuipLinear(64, 12, dtype=torch.bfloat16)


def test_metadata(module):
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    assert not isinstance(weight, nn.Parameter)
    assert weight.shape == (12, 64) == weight.size() == weight.data.shape
    assert (weight.dtype, weight.device, weight.ndim, weight.dim()) == (torch.bfloat16, torch.device("cpu"), 2, 2)
    assert (weight.numel(), weight.element_size(), len(weight)) == (768, 2, 12)
    assert weight.is_floating_point()
    assert not weight.requires_grad
    assert weight.grad is None
    assert not weight.is_meta
    assert repr(weight) == "PackedWeight(shape=[12, 64], dtype=torch.bfloat16, device=cpu)"


def test_it_needs_no_memory(module):
    with torch._C.DisableTorchFunctionSubclass():
        assert module.weight.untyped_storage().nbytes() == 2


def test_it_follows_the_module(module):
    assert module.to(torch.float64).weight.dtype == torch.float64
    assert module.to("meta").weight.is_meta


@pytest.mark.parametrize(
    "use",
    [
        lambda w: w + 1,
        lambda w: w.data.add_(torch.ones(12, 64)),
        lambda w: w.clone(),
        lambda w: w.to(torch.float32),
        lambda w: w @ torch.ones(64, 1),
        lambda w: torch.ones(1, 64) @ w.T,
        lambda w: nn.functional.linear(torch.ones(1, 64), w),
        lambda w: w[0],
        lambda w: w.sum(),
        lambda w: w.copy_(torch.ones(12, 64)),
        lambda w: nn.init.zeros_(w),
        lambda w: setattr(w, "data", torch.ones(12, 64)),
    ],
)
def test_values_are_an_error_that_says_what_to_do(module, use):
    with pytest.raises(ValueError, match=r"stored as codes and has no values.*dequantize\(\)"):
        use(module.weight)


def test_in_place_arithmetic_is_an_error(module):
    weight = module.weight
    with pytest.raises(ValueError, match="stored as codes"):
        weight += torch.ones(12, 64)


@pytest.mark.parametrize("value", [None, torch.ones(12, 64), nn.Parameter(torch.ones(12, 64))])
def test_setting_the_weight_is_an_error(module, value):
    with pytest.raises(AttributeError, match=r"cannot be set: it is stored as codes.*dequantize\(\)"):
        module.weight = value


def test_deleting_the_weight_and_resetting_are_errors(module):
    with pytest.raises(AttributeError):
        del module.weight
    with pytest.raises(TypeError, match="cannot be initialised at random"):
        module.reset_parameters()
