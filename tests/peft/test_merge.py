"""Merging adapters by rounding again, and DoRA, against float64."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from tests.peft.conftest import IDS
from transformers_quip import QuipConfig, QuipLinear
from transformers_quip.calibration import load_token_ids
from transformers_quip.nn.replace import to_dense
from transformers_quip.peft import merge_and_requantize, residual_init
from transformers_quip.quantize.recipe import quantize_model

peft = pytest.importorskip("peft", reason="PEFT is not installed")

DATA = {"num_samples": 8, "sequence_length": 20, "held_out": 4, "batch_size": 4, "progress": False}
TARGETS = ["q_proj", "k_proj", "v_proj", "down_proj"]


def adapted(model, seed=0, **options):
    """With an adapter that is not zero."""
    config = {"r": 4, "lora_alpha": 4, "target_modules": TARGETS, "init_lora_weights": False, **options}
    torch.manual_seed(seed)
    result = peft.get_peft_model(model, peft.LoraConfig(**config)).eval()
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            if "lora_B" in name:
                parameter.mul_(0.2)
            elif "magnitude" in name:
                parameter.mul_(torch.linspace(0.8, 1.2, len(parameter)))
    return result


def lora_layers(model):
    return {n: m for n, m in model.get_base_model().named_modules() if hasattr(m, "lora_A") and len(m.lora_A)}


def merged_weight(layer, quantized_in_float64=None):
    """m (W + s B A) / ‖W + s B A‖ in float64, or W + s B A."""
    a, b = (getattr(layer, f"lora_{x}").default.weight.detach().double() for x in "AB")
    weight = layer.base_layer.dequantize(torch.float64) + layer.scaling["default"] * b @ a
    if "default" in layer.lora_magnitude_vector:
        magnitude = layer.lora_magnitude_vector.default.weight.detach().double()
        weight = weight * (magnitude / weight.norm(dim=1))[:, None]
    return weight


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_dora_is_right(folders, load, arch, dropout):
    targets = ["c_attn", "c_fc"] if arch == "gpt2" else TARGETS
    model = adapted(load(folders(arch)[1]), use_dora=True, target_modules=targets, lora_dropout=dropout)
    for name, layer in lora_layers(model).items():
        x = torch.randn(3, 5, layer.base_layer.in_features, generator=torch.Generator().manual_seed(1), requires_grad=True)
        y = layer(x)
        bias = 0 if layer.base_layer.bias is None else layer.base_layer.bias.double()
        torch.testing.assert_close(y.double(), x.double() @ merged_weight(layer).T + bias, rtol=1e-4, atol=1e-4)
        layer.train()
        layer(x).square().sum().backward()
        assert layer.lora_magnitude_vector.default.weight.grad.abs().sum() > 0, name
        assert x.grad.isfinite().all()


def test_dora_begins_as_the_quantized_model(folders, load):
    model = load(folders("llama")[1])
    with torch.no_grad():
        before = model(IDS).logits
    config = peft.LoraConfig(r=4, target_modules=TARGETS, use_dora=True)
    with torch.no_grad():
        torch.testing.assert_close(peft.get_peft_model(model, config)(IDS).logits, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", [{}, {"use_dora": True}, {"use_rslora": True, "lora_alpha": 3}])
def test_merging_rounds_the_sum_as_a_dense_model_of_the_sums_is_rounded(folders, load, variant):
    folder = folders("llama")[1]
    model = adapted(load(folder), **variant)
    before = {n: p.clone() for n, p in load(folder).state_dict().items()}
    ids, _ = load_token_ids(QuipConfig(dataset=IDS[:12], num_samples=8, sequence_length=20), load(folder), held_out=4)
    with torch.no_grad():
        logits = model(ids[8:]).logits.double().log_softmax(-1)
    # a dense model whose weights are the sums, and the decoded ones where there are no adapters; those stay dense
    sums, layers = load(folder), lora_layers(model)
    for name in _names(sums):
        linear = to_dense(sums.get_submodule(name))
        if name in layers:
            linear.weight.data = merged_weight(layers[name]).float()
        sums.set_submodule(name, linear)
    options = {"dataset": ids[:8], "sequence_length": 20, "num_samples": 8, "batch_size": 4, "refinement_sweeps": 1}
    config = QuipConfig(calibrate_on="dense", modules_to_not_convert=["o_proj", "gate_proj", "up_proj"], **options)
    quantize_model(sums, config, data=(ids[:8], "the same"))
    merged, report = merge_and_requantize(model, IDS[:12], **DATA)
    assert type(merged).__name__ == "LlamaForCausalLM"
    assert not [name for name, _ in merged.named_modules() if "lora" in name]
    assert sorted(record["name"] for record in report.modules) == sorted(
        n for n in _names(merged) if n.endswith(tuple(TARGETS))
    )
    for name, value in merged.state_dict().items():
        if any(target in name for target in TARGETS):
            # sums in float64 differ from those in float32 by rounding errors, which decide ties between codes
            close = torch.isclose(value.double(), sums.state_dict()[name].double(), rtol=1e-3, atol=1e-5)
            assert close.float().mean() > 0.9, name
        else:
            assert torch.equal(value, before[name]), name
    with torch.no_grad():
        after = merged(ids[8:]).logits.double().log_softmax(-1)
    # the last token of a window predicts nothing of it
    kl = (logits.exp() * (logits - after)).sum(-1)[:, :-1].mean().item()
    assert report.divergence.mean == pytest.approx(kl, rel=1e-3)
    assert kl > 0


def _names(model):
    return [name for name, module in model.named_modules() if isinstance(module, QuipLinear)]


def test_the_report(folders, load, tmp_path):
    dense_folder, folder = folders("llama")
    model = residual_init(load(folder), dense_folder, rank=8, progress=False)
    expected = {}
    for name, layer in lora_layers(model).items():
        weight = merged_weight(layer)
        change = weight - layer.base_layer.dequantize(torch.float64)
        expected[name] = (change.square().sum() / weight.square().sum()).item()
    merged, report = merge_and_requantize(model, IDS[:12], **DATA)
    assert {record["name"]: record["change"] for record in report.modules} == pytest.approx(expected, rel=1e-3)
    assert 0 < report.mean_relative_error < 0.2
    assert json.loads(json.dumps(report.modules))
    merged.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert torch.equal(again(IDS).logits, merged(IDS).logits)


def test_dense_layers_and_saved_modules_are_merged_as_peft_does_it(folders, load):
    model = adapted(load(folders("llama")[1]), target_modules=["q_proj", "lm_head"], modules_to_save=["model.norm"])
    base = model.get_base_model()
    assert isinstance(base.lm_head.base_layer, nn.Linear)
    assert not isinstance(base.lm_head.base_layer, QuipLinear)
    head = base.lm_head.base_layer.weight.double() + base.lm_head.get_delta_weight("default").double()
    with torch.no_grad():
        base.model.norm.modules_to_save.default.weight.fill_(1.5)
    merged, _ = merge_and_requantize(model, IDS[:12], **DATA)
    torch.testing.assert_close(merged.lm_head.weight.double(), head, rtol=1e-5, atol=1e-6)
    assert torch.equal(merged.model.norm.weight, torch.full((64,), 1.5))


def test_what_is_refused(folders, load):
    folder = folders("llama")[1]
    with pytest.raises(TypeError, match="needs a PeftModel, not a LlamaForCausalLM"):
        merge_and_requantize(load(folder), IDS)
    with pytest.raises(ValueError, match="no LoRA layer on a quantized linear"):
        merge_and_requantize(adapted(load(folder), target_modules=["lm_head"]), IDS)
    with pytest.raises(ValueError, match="dataset=None: merging needs data"):
        merge_and_requantize(adapted(load(folder)), None)
    with pytest.raises(ValueError, match="the data give 12 sequences, and 12 are held out"):
        merge_and_requantize(adapted(load(folder)), IDS[:12], **(DATA | {"held_out": 12}))
    with pytest.raises(ValueError, match="held_out=0"):
        merge_and_requantize(adapted(load(folder)), IDS[:12], **(DATA | {"held_out": 0}))
    with pytest.raises(ValueError, match="has no bias that could take"):
        merge_and_requantize(adapted(load(folder), lora_bias=True), IDS)
    model = adapted(load(folder))
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="one adapter must be active, not 2"):
        merge_and_requantize(model, IDS)
    model = adapted(load(folder))
    model.get_base_model().config.quantization_config.foreign = {"quant_method": "exl3"}
    with pytest.raises(ValueError, match="only a model that was quantized by this package"):
        merge_and_requantize(model, IDS)
    damaged = adapted(load(folder))
    with torch.no_grad():
        next(p for n, p in damaged.named_parameters() if "lora_A" in n).fill_(float("nan"))
    with pytest.raises(ValueError, match="the adapter 'default' is damaged: it has NaN or Inf"):
        merge_and_requantize(damaged, IDS[:12], **DATA)


def test_biases(folders, load):
    model = adapted(load(folders("gpt2")[1]), target_modules=["c_attn"], lora_bias=True)
    layer = model.get_base_model().transformer.h[0].attn.c_attn
    with torch.no_grad():
        layer.lora_B.default.bias.fill_(0.25)
        expected = layer.base_layer.bias + 0.25
    merged, _ = merge_and_requantize(model, IDS[:12], **DATA)
    torch.testing.assert_close(merged.transformer.h[0].attn.c_attn.bias, expected)
