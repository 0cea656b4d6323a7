"""The two Hessians of a linear against gradients by autograd, sequence by sequence, and against the Fisher information."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.models import tiny_ids, tiny_model
from transformers_quip.calibration import curvature
from transformers_quip.calibration.curvature import collect_curvature

NAMES = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.layers.1.mlp.up_proj")


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Products in float32: bfloat16 would hide small errors."""
    from contextlib import nullcontext

    monkeypatch.setattr(curvature, "calibration_autocast", lambda model: nullcontext())
    monkeypatch.setattr(curvature, "cpu_matmul_precision", lambda precision: nullcontext())


def labels_of(model, ids, generator):
    """Labels by inverse transform sampling, one number for each token."""
    with torch.no_grad():
        chances = model(input_ids=ids[None]).logits[0].float().softmax(-1)
    drawn = torch.rand(len(chances), 1, generator=generator)
    cumulated = chances.cumsum(-1)
    return (cumulated < drawn * cumulated[:, -1:]).sum(-1)


def test_it_is_the_second_moment_of_the_gradients_of_sequences():
    model, ids = tiny_model("llama"), tiny_ids(5, 12)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = collect_curvature(model, NAMES, ids, seed=3, sketch="B", progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    exact, generator = copy.deepcopy(model).double(), torch.Generator().manual_seed(3)
    sums = {name: [0.0, 0.0] for name in NAMES}
    for sequence in ids:
        labels = labels_of(model, sequence, generator)
        loss = nn.functional.cross_entropy(exact(input_ids=sequence[None]).logits[0], labels, reduction="sum")
        weights = [exact.get_submodule(name).weight for name in NAMES]
        for name, gradient in zip(NAMES, torch.autograd.grad(loss, weights), strict=True):
            sums[name][0] += gradient.T @ gradient
            sums[name][1] += gradient @ gradient.T
    for name, (inner, outer) in sums.items():
        scale = inner.diagonal().mean().item(), outer.diagonal().mean().item()
        torch.testing.assert_close(found[name].hessian_in.double(), inner, rtol=1e-3, atol=1e-3 * scale[0])
        torch.testing.assert_close(found[name].hessian_out.double(), outer, rtol=1e-3, atol=1e-3 * scale[1])
        assert found[name].sequences == 5


def test_tokens_apart_weigh_the_moments_of_each_side_by_the_other():
    model, ids = tiny_model("llama"), tiny_ids(5, 12)
    found = collect_curvature(model, NAMES, ids, seed=3, sketch="A", progress=False)
    outputs = collect_curvature(model, NAMES, ids, seed=3, sketch="outputs", progress=False)
    exact, generator = copy.deepcopy(model).double(), torch.Generator().manual_seed(3)
    sums = {name: [0.0, 0.0, 0.0] for name in NAMES}
    for sequence in ids:
        labels = labels_of(model, sequence, generator)
        added, inputs = {}, {}

        def plus_zeros(name, added=added, inputs=inputs):
            def hook(_, arguments, output):
                inputs[name] = arguments[0][0].detach()
                added[name] = torch.zeros_like(output, requires_grad=True)
                return output + added[name]

            return hook

        hooks = [exact.get_submodule(name).register_forward_hook(plus_zeros(name)) for name in NAMES]
        loss = nn.functional.cross_entropy(exact(input_ids=sequence[None]).logits[0], labels, reduction="sum")
        for name, gradient in zip(NAMES, torch.autograd.grad(loss, [added[name] for name in NAMES]), strict=True):
            for x, g in zip(inputs[name], gradient[0], strict=True):
                sums[name][0] += (g @ g) * torch.outer(x, x)
                sums[name][1] += (x @ x) * torch.outer(g, g)
                sums[name][2] += torch.outer(g, g)
        for handle in hooks:
            handle.remove()
    for name, (inner, outer, alone) in sums.items():
        scale = inner.diagonal().mean().item(), outer.diagonal().mean().item()
        torch.testing.assert_close(found[name].hessian_in.double(), inner, rtol=1e-3, atol=1e-3 * scale[0])
        torch.testing.assert_close(found[name].hessian_out.double(), outer, rtol=1e-3, atol=1e-3 * scale[1])
        scale = alone.diagonal().mean().item()
        torch.testing.assert_close(outputs[name].hessian_out.double(), alone, rtol=1e-3, atol=1e-3 * scale)
        assert outputs[name].hessian_in is None


def test_labels_are_drawn_from_the_predictions():
    """With many drawn labels, the mean of the squared gradient of the logits is the Fisher information p (1 - p)."""
    model = tiny_model("llama")
    ids = tiny_ids(1, 4).expand(3000, 4)
    seen = []

    def watch(_, __, output):
        output.register_hook(lambda gradient: seen.append(gradient[0].double().square()))

    model.lm_head.register_forward_hook(watch)
    collect_curvature(model, NAMES[:1], ids, progress=False)
    p = model(input_ids=ids[:1]).logits[0].double().softmax(-1)
    mean, truth = torch.stack(seen).mean(0), (p * (1 - p)).detach()
    error = (p * (1 - p) * (1 - 2 * p).square() / 3000).sqrt().detach() + 1e-6
    assert ((mean - truth).abs() < 5.5 * error + 1e-5).all()


def test_parts_that_fit_the_memory_give_the_same():
    model, ids = tiny_model("llama"), tiny_ids(3, 8)
    whole = collect_curvature(model, NAMES, ids, sketch="A", progress=False)
    parts = collect_curvature(model, NAMES, ids, sketch="A", budget=1, progress=False)
    assert list(parts) == list(NAMES)
    for name in NAMES:
        assert torch.equal(parts[name].hessian_in, whole[name].hessian_in)
        assert torch.equal(parts[name].hessian_out, whole[name].hessian_out)


@pytest.mark.parametrize(("arch", "name"), [("gpt2", "transformer.h.0.mlp.c_fc"), ("qwen2_moe", None)])
@pytest.mark.parametrize("sketch", ["A", "B"])
def test_other_modules(arch, name, sketch):
    model = tiny_model(arch)
    names = [name] if name else [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in n]
    found = collect_curvature(model, names, tiny_ids(2, 6), sketch=sketch, progress=False)
    assert found
    for each, sums in found.items():
        weight = model.get_submodule(each).weight
        shape = weight.shape if isinstance(model.get_submodule(each), nn.Linear) else weight.T.shape
        assert sums.hessian_out.shape == (shape[0], shape[0])
        assert sums.hessian_in.shape == (shape[1], shape[1])
        # the trace of both is Σ ‖G‖², or Σ ‖x‖² ‖g‖²
        torch.testing.assert_close(sums.hessian_in.trace(), sums.hessian_out.trace(), rtol=1e-3, atol=1e-6)


def test_gradients_that_overflow_are_named():
    model = tiny_model("llama")
    model.model.layers[0].self_attn.q_proj.weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match="the gradients of model.layers.* have NaN or Inf"):
        collect_curvature(model, NAMES, tiny_ids(2, 6), progress=False)
