"""Quantize, save, reload, for every module tree; and what the saved file means, by the format's description alone."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from tests import truth
from tests.models import ARCHITECTURES, tiny_model
from transformers_quip import QuipConfig, QuipLinear
from transformers_quip.checkpoints.names import expand_names
from transformers_quip.nn.replace import quantized_linears


@pytest.fixture(params=["calibrated", "uncalibrated"])
def config(request, calibrated_config):
    return calibrated_config if request.param == "calibrated" else QuipConfig(dataset=None)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@torch.no_grad()
def test_quantize_save_reload(arch, config, dense, ids, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(dense(arch), quantization_config=config)
    logits = model(ids).logits
    linears = quantized_linears(model)
    assert len(linears) >= 8
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1

    reloaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    again = quantized_linears(reloaded)
    assert list(again) == list(linears)
    for name, linear in linears.items():
        for key, value in linear.named_parameters():
            assert torch.equal(again[name].get_parameter(key), value), f"{name}.{key}"
        assert not any(p.requires_grad for p in again[name].parameters())
    assert torch.equal(reloaded(ids).logits, logits)

    # The file by the formula, in a plain model: what any other reader of the format would compute.
    tensors = {key: value for file in tmp_path.glob("*.safetensors") for key, value in load_file(file).items()}
    # Mixtral's makers have another name for this, which Transformers writes
    tensors = {key.replace(".block_sparse_moe.", ".mlp."): value for key, value in tensors.items()}
    by_formula = tiny_model(arch)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    for name in expand_names(saved["quantized_modules"]):
        if f"{name}_codes" in tensors:  # experts
            stacks = (tensors[f"{name}_{key}"] for key in ("codes", "su", "sv"))
            weights = [truth.dense_weight(*parts) for parts in zip(*stacks, strict=True)]
            by_formula.get_parameter(name).copy_(torch.stack(weights))
            continue
        weight = truth.dense_weight(*(tensors[f"{name}.{key}"] for key in ("codes", "su", "sv"))).float()
        module = by_formula.get_submodule(name)
        module.weight.copy_(weight.T if isinstance(module, Conv1D) else weight)
    torch.testing.assert_close(logits, by_formula(ids).logits, rtol=1e-4, atol=1e-4)

    # And it is an approximation of the dense model, not of anything else.
    reference = tiny_model(arch)
    for name, linear in linears.items():
        module = reference.get_submodule(name)
        weight = module.weight.T if isinstance(module, Conv1D) else module.weight
        error = (linear.dequantize() - weight).norm() / weight.norm()
        assert error < 0.6, f"{name} has relative error {error}"


@pytest.mark.parametrize("arch", ["llama", "gpt2", "mixtral"])
@torch.no_grad()
def test_dequantize_gives_a_plain_model(arch, dense, quantized, ids, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(quantized(arch))
    logits = model(ids).logits
    model.dequantize()
    assert not any(isinstance(module, QuipLinear) for module in model.modules())
    assert [(name, type(module)) for name, module in model.named_modules()] == [
        (name, type(module)) for name, module in tiny_model(arch).named_modules()
    ]
    torch.testing.assert_close(model(ids).logits, logits, rtol=1e-4, atol=1e-4)
    assert all(p.requires_grad for p in model.parameters())
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert torch.equal(plain(ids).logits, model(ids).logits)


def test_config_json_says_what_was_done(dense, calibrated_config, tmp_path):
    data = calibrated_config.dataset
    AutoModelForCausalLM.from_pretrained(dense("llama"), quantization_config=calibrated_config).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert saved["quant_method"] == "quip"
    assert saved["format_version"] == 1
    assert saved["codebook"] == "e8p"
    assert saved["dataset"] == "4 token sequences given by the caller"
    assert saved["quantized_modules"][0] == "model.layers.{0-1}.self_attn.q_proj"
    assert len(saved["quantized_modules"]) == 7
    # The caller's config is as it was, and can be used again.
    assert calibrated_config.dataset is data
    assert calibrated_config.quantized_modules is None


def test_the_head_is_dense_and_ties_stay(quantized):
    model = AutoModelForCausalLM.from_pretrained(quantized("qwen3"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tensors = load_file(Path(quantized("qwen3")) / "model.safetensors")
    assert "lm_head.weight" not in tensors
    assert not any(key.endswith("_proj.weight") for key in tensors)
