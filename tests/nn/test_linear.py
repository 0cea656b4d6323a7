"""QuipLinear: what it computes, and how it behaves as a module among modules."""

import copy
import io
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests import truth
from transformers_quip import QuipConfig, QuipLinear
from transformers_quip.nn.replace import quantized_linear


def quantized(m=12, n=64, bias=True, dtype=torch.float32):
    """A module with random values, and what it must compute as a dense float64 weight."""
    parts = truth.random_linear(m, n, dtype=dtype)
    module = QuipLinear(n, m, bias, dtype=dtype)
    module.load_state_dict({name: value for name, value in parts.items() if bias or name != "bias"})
    return module, truth.dense_weight(parts["codes"], parts["su"], parts["sv"]), parts["bias"].double() * bias


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("m", "n"), [(12, 64), (64, 12), (16, 96)])
def test_forward_and_dequantize(m, n, bias):
    module, weight, offset = quantized(m, n, bias)
    x = torch.randn(2, 5, n)
    torch.testing.assert_close(module(x).double(), x.double() @ weight.T + offset, rtol=1e-5, atol=1e-4)
    dense = module.dequantize()
    assert dense.dtype == torch.float32
    assert dense.is_contiguous()
    torch.testing.assert_close(dense.double(), weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(module.dequantize(torch.float64), weight, rtol=1e-12, atol=1e-12)
    assert module.dequantize(torch.bfloat16).dtype == torch.bfloat16


def test_it_is_a_frozen_linear_without_weight_and_buffers():
    module, *_ = quantized()
    assert isinstance(module, nn.Linear)
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == {
        "codes": (12, 8),
        "su": (64,),
        "sv": (12,),
        "bias": (12,),
    }
    assert not any(p.requires_grad for p in module.parameters())
    assert not list(module.buffers())
    assert (module.in_features, module.out_features) == (64, 12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_true_bits_count_everything_that_is_stored(dtype):
    module = QuipLinear(64, 12, dtype=dtype)
    stored = 12 * 8 * 2 + (64 + 12) * dtype.itemsize
    assert module.packed_bytes == stored
    assert module.true_bits == pytest.approx(8 * stored / (12 * 64))
    assert f"bits={module.true_bits:.3f}" in repr(module)
    assert "codebook=e8p" in repr(module)
    # A last block that is not full is stored, and counted, whole.
    assert QuipLinear(65, 12, dtype=dtype).packed_bytes == stored + 12 * 2 + dtype.itemsize


@pytest.mark.parametrize("x", [torch.randn(3, 63), torch.randn(()), torch.zeros(3, 64, dtype=torch.long)])
def test_wrong_input(x):
    with pytest.raises(ValueError, match=r"expected floating point \[\.\.\., 64\]"):
        quantized()[0](x)


@pytest.mark.parametrize(("n", "m"), [(0, 4), (4, -1)])
def test_wrong_size(n, m):
    with pytest.raises(ValueError, match="must be positive"):
        QuipLinear(n, m)


def test_copies_compute_the_same():
    module, *_ = quantized()
    x = torch.randn(3, 64)
    y = module(x)
    saved = io.BytesIO()
    torch.save(module.state_dict(), saved)
    saved.seek(0)
    loaded = QuipLinear(64, 12)
    assert torch.equal(loaded(x), torch.zeros(3, 12))
    loaded.load_state_dict(torch.load(saved, weights_only=True))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
        assert torch.equal(other(x), y)
        assert other.codes.data_ptr() != module.codes.data_ptr()


def test_to_dtype_casts_the_vectors_and_keeps_the_codes():
    module, *_ = quantized()
    codes = module.codes.clone()
    module.to(torch.bfloat16)
    assert module.su.dtype == module.sv.dtype == module.bias.dtype == torch.bfloat16
    assert torch.equal(module.codes, codes)
    assert module(torch.randn(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


class Reader(nn.Module):
    """Reads the weight's metadata, as models do (T5)."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return self.linear(x.to(self.linear.weight.dtype)) * self.linear.weight.shape[0]


def test_compile_without_graph_break():
    module, *_ = quantized()
    x = torch.randn(3, 64)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(module, fullgraph=True, backend="aot_eager")(x), module(x))
    compiled = torch.compile(Reader(module), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x.double()), 12 * module(x))


def test_gradient_reaches_the_input():
    module, weight, _ = quantized()
    x = torch.randn(3, 64, requires_grad=True)
    module(x).sum().backward()
    torch.testing.assert_close(x.grad.double(), weight.sum(0).expand(3, 64), rtol=1e-5, atol=1e-4)
    assert all(p.grad is None for p in module.parameters())


def values(m, n, dtype=torch.float32):
    parts = truth.random_linear(m, n, dtype=dtype)
    return SimpleNamespace(tensors=truth.stored(parts), su=parts["su"], sv=parts["sv"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_from_quantized_linear(dtype, bias):
    linear = nn.Linear(64, 12, bias, dtype=dtype).eval()
    given = values(12, 64)
    module = quantized_linear(linear, given, QuipConfig(seed=4))
    assert torch.equal(module.codes, given.tensors["codes"])
    assert torch.equal(module.su, given.su.to(dtype))
    assert module.bias is None if not bias else torch.equal(module.bias, linear.bias)
    assert (module.seed, module.codebook, module.conv1d) == (4, "e8p", False)
    assert (module.incoherence_in, module.incoherence_out) == ("hadamard", "hadamard")
    assert not module.training
    assert not any(p.requires_grad for p in module.parameters())
    assert module.weight.dtype == dtype


def test_from_quantized_shares_nothing():
    given = values(12, 64)
    module = quantized_linear(nn.Linear(64, 12), given, QuipConfig())
    for name, value in {**given.tensors, "su": given.su, "sv": given.sv}.items():
        assert module.get_parameter(name).data_ptr() != value.data_ptr()


def test_from_quantized_conv1d():
    module = quantized_linear(Conv1D(12, 64), values(12, 64), QuipConfig())
    assert (module.in_features, module.out_features, module.conv1d) == (64, 12, True)


def test_from_quantized_checks_the_shapes():
    with pytest.raises(
        ValueError, match=r"codes of a \[12, 64\] layer .* must be torch.int16 \[12, 8\], got torch.int16 \[64, 2\]"
    ):
        quantized_linear(nn.Linear(64, 12), values(64, 12), QuipConfig())
    given = values(12, 64)
    given.sv = given.sv[:11]
    with pytest.raises(ValueError, match=r"sv of a \[12, 64\] weight must have shape \[12\], got \[11\]"):
        quantized_linear(nn.Linear(64, 12), given, QuipConfig())
