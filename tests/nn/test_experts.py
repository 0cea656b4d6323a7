"""Quantized experts against Transformers' own modules with the dense weights that the codes stand for."""

import copy
import pickle

import pytest
import torch
from torch import nn

from tests import truth
from tests.nn.experts import EXPERTS, HIDDEN, INNER, KINDS, TOKENS, UNROUTED, dense_experts, inputs
from transformers_quip import QuipConfig
from transformers_quip.nn.experts import QuipExperts
from transformers_quip.nn.stacks import find_stacks
from transformers_quip.quantize.stack import quantize_stack

CONFIG = QuipConfig(dataset=None)


def quantized_experts(dense, config=CONFIG):
    module = QuipExperts(dense, config, "experts")
    for name, stack in module.stacks.items():
        weights = stack.split(dense.get_parameter(name).detach())
        quantized = quantize_stack(weights, config.for_module(f"experts.{name}"), name)
        module.take(name, quantized, torch.device("cpu"))
    return module.eval()


def by_formula(module, dense):
    """Transformers' module with the weights of the format's formula."""
    result = copy.deepcopy(dense)
    for name, parameter in result.named_parameters():
        if f"{name}_codes" in dict(module.named_parameters()):
            tensors = [module.get_parameter(f"{name}_{key}") for key in ("codes", "su", "sv")]
            weights = torch.stack([truth.dense_weight(*parts) for parts in zip(*tensors, strict=True)]).float()
            if name == "w2" or weights[0].T.shape == parameter.shape[1:]:  # it is stored the other way round
                weights = weights.mT
            parameter.data = weights.contiguous().view(parameter.shape)
    return result


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@torch.no_grad()
def test_the_forward_is_that_of_transformers_with_the_decoded_weights(kind):
    dense = dense_experts(kind)
    module = quantized_experts(dense)
    expected = by_formula(module, dense)(*inputs(kind))
    assert expected.abs().mean() > 1e-3
    torch.testing.assert_close(module(*inputs(kind)), expected, rtol=1e-4, atol=1e-5)
    assert (expected - dense(*inputs(kind))).norm() < 0.9 * dense(*inputs(kind)).norm()


@torch.no_grad()
def test_dequantized_it_is_the_same_module_as_before(kind):
    dense = dense_experts(kind)
    module = quantized_experts(dense)
    back = module.to_dense()
    assert type(back) is type(dense)
    assert {n: p.shape for n, p in back.named_parameters()} == {n: p.shape for n, p in dense.named_parameters()}
    for name, parameter in by_formula(module, dense).named_parameters():
        torch.testing.assert_close(back.get_parameter(name), parameter, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(back(*inputs(kind)), module(*inputs(kind)), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_copies_and_pickles_compute_the_same(kind):
    module = quantized_experts(dense_experts(kind))
    expected = module(*inputs(kind))
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(again(*inputs(kind)), expected)
        next(again.parameters()).data.zero_()
        assert torch.equal(module(*inputs(kind)), expected)


@torch.no_grad()
def test_matrices_below_each_other():
    dense = dense_experts("flat")
    whole, expected = copy.deepcopy(dense), copy.deepcopy(dense)
    whole.mlp = quantized_experts(dense.mlp)
    assert whole.mlp.w2_codes.shape == (EXPERTS, HIDDEN, INNER // 8)
    expected.mlp = by_formula(whole.mlp, dense.mlp)
    torch.testing.assert_close(whole(*inputs("flat")), expected(*inputs("flat")), rtol=1e-4, atol=1e-5)
    back = whole.mlp.to_dense()
    for name, parameter in expected.mlp.named_parameters():
        torch.testing.assert_close(back.get_parameter(name), parameter, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="stored as codes"):
        whole.mlp.w1.view(2, -1)


@torch.no_grad()
def test_every_tensor_of_a_weight_is_a_stacked_parameter_of_the_module():
    module = quantized_experts(dense_experts("standard"))
    shapes = {name: list(p.shape) for name, p in module.named_parameters()}
    assert shapes == {
        "gate_up_proj_codes": [4, 64, 3],
        "gate_up_proj_su": [4, 24],
        "gate_up_proj_sv": [4, 64],
        "down_proj_codes": [4, 24, 4],
        "down_proj_su": [4, 32],
        "down_proj_sv": [4, 24],
    }
    assert not any(p.requires_grad for p in module.parameters())
    assert module.packed_bytes("down_proj") == 4 * (24 * 4 * 2 + 4 * 32 + 4 * 24)
    assert "down_proj: [4, 24, 32], codebook=e8p" in repr(module)


@torch.no_grad()
def test_a_number_beyond_the_last_expert_means_none():
    module = quantized_experts(dense_experts("standard"))
    x, chosen, weights = inputs("standard")
    chosen[3] = EXPERTS
    chosen[4, 1] = EXPERTS
    expected = by_formula(module, dense_experts("standard"))(x, chosen.clamp(max=EXPERTS - 1), weights * (chosen < EXPERTS))
    found = module(x, chosen, weights)
    assert not found[3].any()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_no_tokens_and_one_token():
    module = quantized_experts(dense_experts("interleaved, biased"))
    x, chosen, weights = inputs("interleaved, biased")
    assert module(x[:0], chosen[:0], weights[:0]).shape == (0, HIDDEN)
    whole = module(x, chosen, weights)
    for token in range(TOKENS):
        part = slice(token, token + 1)
        one = module(x[part], router_indices=chosen[part], routing_weights=weights[part])
        torch.testing.assert_close(one, whole[part], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_experts_without_tokens_are_not_read():
    module = quantized_experts(dense_experts("standard"))
    x, chosen, weights = inputs("standard")
    expected = module(x, chosen, weights)
    assert torch.equal(module(x, chosen.int(), weights), expected)
    for name in ("gate_up_proj_sv", "down_proj_su"):
        module.get_parameter(name)[2] = torch.nan
    assert torch.equal(module(*inputs("standard")), expected)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("one projection",)], indirect=True)
def test_gradients_flow_to_the_tokens_and_the_routing_weights(kind):
    dense = dense_experts(kind)
    module = quantized_experts(dense)
    results = []
    for experts in (module, by_formula(module, dense).requires_grad_(False)):
        given = [v.clone().requires_grad_() if v.is_floating_point() else v for v in inputs(kind)]
        y = experts(*given)
        (y * torch.linspace(-1, 1, y.shape[-1])).sum().backward()
        results.append([v.grad for v in given if v.is_floating_point()])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in UNROUTED], indirect=True)
@torch.no_grad()
def test_compiled_in_one_graph(kind):
    module = quantized_experts(dense_experts(kind))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs(kind)), module(*inputs(kind)), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_half_precision():
    dense = dense_experts("standard").to(torch.bfloat16)
    module = quantized_experts(dense)
    x, chosen, weights = inputs("standard")
    y = module(x.bfloat16(), chosen, weights)
    assert y.dtype == torch.bfloat16
    assert module.gate_up_proj_su.dtype == torch.bfloat16
    expected = by_formula(module, dense.float())(x, chosen, weights)
    assert (y.float() - expected).norm() < 0.03 * expected.norm()


@torch.no_grad()
def test_other_codebooks_and_bits_for_one_projection():
    config = QuipConfig(dataset=None, bits=4, modules={"down_proj": {"codebook": "scalar2", "incoherence": "none"}})
    dense = dense_experts("standard")
    module = quantized_experts(dense, config)
    assert module.gate_up_proj_codes_residual.shape == (4, 64, 3)
    assert module.forms["down_proj"].codebook == "scalar2"
    dequantized = module.to_dense()(*inputs("standard"))
    torch.testing.assert_close(module(*inputs("standard")), dequantized, rtol=1e-4, atol=1e-5)
    gate_up = (module.dequantize("gate_up_proj") - dense.gate_up_proj).norm() / dense.gate_up_proj.norm()
    assert gate_up < 0.15


def test_values_of_a_quantized_weight_are_not_there():
    module = quantized_experts(dense_experts("standard"))
    assert tuple(module.gate_up_proj.shape) == (4, 64, 24)
    for use in (
        lambda: module.gate_up_proj + 1,
        lambda: module.gate_up_proj.float(),
        lambda: torch.ones(3, 64) @ module.gate_up_proj[0].float(),
        lambda: torch.ones(3, 64) @ module.gate_up_proj[0],
        lambda: nn.functional.linear(torch.ones(3, 24), module.gate_up_proj[0].T),
        lambda: torch.bmm(torch.ones(4, 3, 24), module.gate_up_proj),
    ):
        with pytest.raises((ValueError, TypeError), match="experts are stored as codes|unsupported operand"):
            use()
    with pytest.raises(TypeError, match="cannot be initialised at random"):
        module.reset_parameters()


def test_modules_that_are_not_stacks_of_experts():
    class Other(nn.Module):
        def __init__(self, **shapes):
            super().__init__()
            for name, shape in shapes.items():
                self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    assert find_stacks(nn.Conv1d(4, 4, 3)) == {}
    assert find_stacks(nn.MultiheadAttention(8, 2)) == {}
    assert find_stacks(Other(q=(4, 8, 2), k=(4, 8, 2))) == {}
    assert find_stacks(Other(gate_up_proj=(2, 16, 6), down_proj=(2, 7, 8))) == {}
    assert find_stacks(Other(gate_up_proj=(2, 16, 6), down_proj=(2, 6, 8), other=(2, 3, 4))) == {}
    assert find_stacks(Other(weight=(2, 3, 4))) == {}
    found = find_stacks(Other(gate_up_proj=(2, 6, 16), down_proj=(2, 8, 6), bias=(2, 6)))
    assert {name: (s.shape, s.transposed) for name, s in found.items()} == {
        "gate_up_proj": ((2, 16, 6), True),
        "down_proj": ((2, 6, 8), True),
    }
    with pytest.raises(ValueError, match=r"layer\.experts \(Other\) is not a module of stacked experts"):
        QuipExperts(Other(weight=(2, 3, 4)), CONFIG, "layer.experts")
