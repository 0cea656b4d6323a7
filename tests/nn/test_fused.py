"""Linears that are stored as one, or one that is stored as several: what they compute, and how often."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from tests import truth
from transformers_quip import QuipLinear
from transformers_quip.nn.fused import FusedRows, Fusion, JoinedLinear


class Projections(nn.Module):
    """Like an attention module: three linears of one input, which are stored as one."""

    def __init__(self):
        super().__init__()
        tensors = truth.random_linear(128, 64)
        self.qkv_proj = QuipLinear(64, 128, bias=False)
        del tensors["bias"]
        self.qkv_proj.load_state_dict(tensors)
        fusion = Fusion(self, "qkv_proj", 3)
        self.q_proj, self.k_proj = FusedRows(fusion, 0, 64), FusedRows(fusion, 64, 96)
        self.v_proj = FusedRows(fusion, 96, 128)

    def forward(self, x):
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)


@pytest.fixture
def module():
    return Projections().requires_grad_(False).eval()


@pytest.fixture
def x():
    return torch.randn(3, 64, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def expected(module, x):
    linear = module.qkv_proj
    return (x.double() @ truth.dense_weight(linear.codes, linear.su, linear.sv).T).float()


def calls_of(module: nn.Module) -> list:
    calls: list = []
    module.qkv_proj.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_computed_once_for_all(module, x, expected):
    calls = calls_of(module)
    for count in (1, 2):
        torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-3)
        assert len(calls) == count
    assert module.q_proj.fusion._outputs.is_empty  # nothing is kept alive


def test_any_order_and_number_of_calls(module, x, expected):
    other = x + 1
    shift = expected - module(other)
    torch.testing.assert_close(module.v_proj(x), expected[:, 96:], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(module.v_proj(other), (expected - shift)[:, 96:], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(module.k_proj(x), expected[:, 64:96], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(module.k_proj(x.clone()), expected[:, 64:96], rtol=1e-4, atol=1e-3)


def test_an_input_that_is_changed_in_place_is_computed_again(module, x, expected):
    value = torch.zeros_like(x)
    module.q_proj(value)
    value.copy_(x)
    torch.testing.assert_close(module.k_proj(value), expected[:, 64:96], rtol=1e-4, atol=1e-3)


def test_gradients_after_a_call_without(module, x, expected):
    x.requires_grad_(True)
    with torch.no_grad():
        module.q_proj(x)
    module.k_proj(x).sum().backward()
    linear = module.qkv_proj
    weight = truth.dense_weight(linear.codes, linear.su, linear.sv)[64:96]
    torch.testing.assert_close(x.grad, weight.sum(0).float().expand(3, 64), rtol=1e-4, atol=1e-3)


def test_metadata(module):
    assert module.k_proj.weight.shape == (32, 64)
    assert (module.k_proj.in_features, module.k_proj.out_features) == (64, 32)
    assert sorted(module.state_dict()) == ["qkv_proj.codes", "qkv_proj.su", "qkv_proj.sv"]
    with pytest.raises(TypeError, match="cannot be initialised"):
        module.k_proj.reset_parameters()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_are_independent(duplicate, module, x, expected):
    module.q_proj(x)
    other = duplicate(module)
    assert other.q_proj.fusion is other.v_proj.fusion
    assert other.q_proj.fusion.parent is other
    other.qkv_proj.sv.zero_()
    assert not other(x).any()
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_compiled_without_graph_breaks_and_computed_once(mode, module, x, expected):
    counts = []

    def compiler(graph, inputs):
        counts.append(sum("quip.linear" in str(node.target) for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    with mode():
        compiled = torch.compile(module, fullgraph=True, backend=aot_autograd(fw_compiler=compiler))
        for value in (x, x.clone()):
            torch.testing.assert_close(compiled(value), expected, rtol=1e-4, atol=1e-3)
    assert set(counts) == {1}  # in inference mode, a tensor from outside is another kind of input
    assert module.q_proj.fusion._outputs.is_empty


def test_joined():
    parts = {}
    weights = []
    for seed, (name, rows) in enumerate((("q_proj", 64), ("k_proj", 32))):
        tensors = truth.random_linear(rows, 64, seed)
        parts[name] = QuipLinear(64, rows)
        parts[name].load_state_dict(tensors)
        weights.append((truth.dense_weight(tensors["codes"], tensors["su"], tensors["sv"]), tensors["bias"]))
    joined = JoinedLinear(parts)
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(3))
    expected = torch.cat([x.double() @ weight.T + bias for weight, bias in weights], 1).float()
    torch.testing.assert_close(joined(x), expected, rtol=1e-4, atol=1e-3)
    assert (joined.in_features, joined.out_features) == (64, 96)
    assert "q_proj.codes" in joined.state_dict()
