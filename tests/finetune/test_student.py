"""A student computes what the quantized model computes, and what it learns is merged into su, sv and the norms."""

from __future__ import annotations

import pytest
import torch

from tests.finetune.conftest import IDS, pair
from tests.models import tiny_model
from transformers_quip.finetune.student import tuned
from transformers_quip.nn import QuipLinear


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS[:2]).logits


@pytest.mark.parametrize("arch", ["llama", "gemma3", "gpt2", "phi3", "qwen3", "opt"])
def test_it_begins_as_the_quantized_model_and_merging_keeps_what_it_learned(arch):
    _, model = pair(arch)
    before, state = logits(model), {n: p.clone() for n, p in model.state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    with tuned(model, IDS[:1]) as student:
        torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            for value in student.trained().values():
                value.mul_(1 + 0.1 * torch.randn(value.shape, generator=generator))
        learned = logits(model)
    assert (learned - before).abs().max() > 1e-2
    torch.testing.assert_close(logits(model), learned, rtol=1e-4, atol=1e-4)
    after = model.state_dict()
    assert after.keys() == state.keys()
    for name, value in after.items():
        if not value.is_floating_point():
            assert torch.equal(value, state[name]), name  # the codes
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".su" in n or ".sv" in n or ".codes" in n)


def test_an_error_leaves_the_model_as_it_was():
    _, model = pair("llama")
    state, trained = {n: p.clone() for n, p in model.state_dict().items()}, [p.requires_grad for p in model.parameters()]

    def stopped():
        with tuned(model, IDS[:1]) as student, torch.no_grad():
            for value in student.trained().values():
                value.mul_(2)
            raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        stopped()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == trained


def test_what_is_trained_and_that_linears_of_one_input_keep_one_su():
    _, model = pair("llama")
    with tuned(model, IDS[:1]) as student:
        names = set(student.trained())
        with torch.no_grad():
            for value in student.trained().values():
                value.mul_(1.25)
    block = "model.layers.0"
    linears = ["q_proj", "k_proj", "v_proj", "o_proj"]
    expected = {f"{block}.self_attn.{name}.a" for name in linears}
    expected |= {f"{block}.mlp.{name}_proj.a" for name in ("gate", "up", "down")}
    # q, k, v, gate and up read what a norm has written; the norm's weight is trained instead of their su
    expected |= {f"{block}.self_attn.o_proj.b", f"{block}.mlp.down_proj.b"}
    expected |= {f"{block}.input_layernorm.weight", f"{block}.post_attention_layernorm.weight"}
    assert {name for name in names if name.startswith(block)} == expected
    assert "model.norm.weight" in names
    attention = model.model.layers[0].self_attn
    assert torch.equal(attention.q_proj.su, attention.k_proj.su)


def test_linears_of_one_input_without_a_norm_share_their_multipliers():
    _, model = pair("llama")
    for layer in model.model.layers:  # as if something stood between the norm and the linears
        layer.input_layernorm.forward = lambda x, f=layer.input_layernorm.forward: f(x)
        layer.self_attn.register_forward_pre_hook(
            lambda _, args, kwargs: (args, {**kwargs, "hidden_states": kwargs["hidden_states"] * 1.0}), with_kwargs=True
        )
    with tuned(model, IDS[:1]) as student:
        q, k, v, o = (student.linears[f"model.layers.0.self_attn.{n}_proj"] for n in "qkvo")
        assert q.b is k.b is v.b is not None
        assert o.b is not q.b
        assert sum(name.endswith(".b") and "layers.0.self_attn" in name for name in student.trained()) == 2
        with torch.no_grad():
            q.b.copy_(torch.linspace(0.5, 2, len(q.b)))
    attention = model.model.layers[0].self_attn
    assert torch.equal(attention.q_proj.su, attention.v_proj.su)


def test_the_learning_rate_of_a_norm_follows_its_size():
    _, model = pair("gemma3")
    norm = model.model.layers[0].input_layernorm.weight
    with tuned(model, IDS[:1]) as student:
        # Gemma multiplies by 1 + weight
        expected = (1 + norm.detach()).square().mean().sqrt().item()
        assert student.scales["model.layers.0.input_layernorm.weight"] == pytest.approx(expected)
        rates = {id(p): group["lr"] for group in student.groups(0.5) for p in group["params"]}
        assert rates[id(norm)] == pytest.approx(0.5 * expected)
        assert rates[id(student.linears["model.layers.0.mlp.down_proj"].a)] == 0.5


def test_a_dense_model_is_refused():
    with pytest.raises(ValueError, match="no quantized linears"), tuned(tiny_model("llama"), IDS[:1]):
        pass


def test_half_precision_is_rounded_once():
    _, model = pair("llama")
    model.to(torch.bfloat16)
    linear = next(m for m in model.modules() if isinstance(m, QuipLinear))
    before = linear.sv.float().clone()
    factors = torch.linspace(0.9, 1.1, len(before))
    with tuned(model, IDS[:1]) as student, torch.no_grad():
        next(iter(student.linears.values())).a.copy_(factors)
    assert linear.sv.dtype == torch.bfloat16
    assert torch.equal(linear.sv, (before * factors).to(torch.bfloat16))
