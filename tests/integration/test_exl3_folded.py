"""Architectures into whose weights exllamav3 folds factors: the logits must be those of the dense weights."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Mistral3Config, Mistral4Config, PretrainedConfig

from tests import foreign
from tests.models import tiny_config, tiny_ids
from transformers_quip.checkpoints.foreign.exl3_folded import folded_factor
from transformers_quip.hf.convert import convert

EXL3 = {"quantization_config": {"quant_method": "exl3", "version": "1.6.5"}}


def write(arch, folder, factors, **options):
    """A folder of EXL3 and a dense one.

    Args:
        factors: regular expression of names → what exllamav3 has multiplied these weights by. Here their svh holds it, in
            float32, so that it is exact.
    """

    def make(*arguments):
        tensors, weight = foreign.exl3()(*arguments)
        return tensors | {"svh": tensors["svh"].float()}, weight

    def fold(tensors):
        for pattern, factor in factors.items():
            found = [key for key in tensors if re.search(pattern + r"\.svh$", key)]
            assert found, pattern
            for key in found:
                tensors[key] = tensors[key] * factor

    return foreign.write_checkpoints(arch, folder, make, EXL3, finish=fold, **options)


@torch.no_grad()
def compare(folders):
    packed, dense = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in folders)
    expected = dense(tiny_ids()).logits
    assert ((packed(tiny_ids()).logits - expected).norm() / expected.norm()).item() < 1e-4
    convert(folders[0], folders[0].parent / "converted")
    again = AutoModelForCausalLM.from_pretrained(folders[0].parent / "converted", dtype=torch.float32)
    assert torch.equal(again(tiny_ids()).logits, packed(tiny_ids()).logits)


ROUTED = r"layers\.1\.mlp\.experts\.\d+\.up_proj"


def test_routed_experts(tmp_path):
    compare(write("laguna", tmp_path, {ROUTED: 1 / 128}))


@pytest.mark.parametrize("scale", [0.707, 0.5, None])
def test_values_of_mimo(scale, tmp_path):
    compare(write("mimo_v2_flash", tmp_path, {r"self_attn\.o_proj": scale or 1}, attention_value_scale=scale))


def test_names():
    laguna, mimo, llama = map(tiny_config, ("laguna", "mimo_v2_flash", "llama"))
    mistral = Mistral4Config()
    for config in (laguna, mistral):
        assert folded_factor(config, "model.layers.7.mlp.experts.12.up_proj") == 1 / 128
        for other in (
            "shared_experts.up_proj",
            "shared_expert.up_proj",
            "up_proj",
            "experts.3.gate_proj",
            "experts.3.down_proj",
        ):
            assert folded_factor(config, f"model.layers.7.mlp.{other}") == 1
        assert folded_factor(config, "model.layers.7.self_attn.o_proj") == 1
    assert folded_factor(mimo, "model.layers.47.mlp.experts.0.up_proj") == 1 / 128
    assert folded_factor(mimo, "model.layers.46.mlp.experts.0.up_proj") == 1
    assert folded_factor(mimo, "model.layers.4.mlp.experts.47.up_proj") == 1
    assert folded_factor(mimo, "model.layers.3.self_attn.o_proj") == 0.707
    for name in ("model.layers.47.mlp.experts.0.up_proj", "model.layers.3.self_attn.o_proj"):
        assert folded_factor(llama, name) == 1
    text = Mistral3Config(text_config=mistral.to_dict())
    assert folded_factor(text, "model.language_model.layers.7.mlp.experts.12.up_proj") == 1 / 128


@pytest.mark.parametrize("scale", ["0.707", True, 0, -1.0, float("nan"), 10**400, []])
def test_a_scale_that_cannot_be(scale):
    config = tiny_config("mimo_v2_flash")
    config.__dict__["attention_value_scale"] = scale
    with pytest.raises(ValueError, match="attention_value_scale=.*must be a positive number"):
        folded_factor(config, "model.layers.3.self_attn.o_proj")


def test_another_mimo():
    config = PretrainedConfig()
    config.model_type = "mimo_v2_pro"
    with pytest.raises(ValueError, match="model_type='mimo_v2_pro': exllamav3 folds factors"):
        folded_factor(config, "model.layers.0.mlp.up_proj")


def test_a_dense_weight_that_may_hold_the_factor(tmp_path):
    folder, dense = write("mimo_v2_flash", tmp_path, {r"layers\.0\.self_attn\.o_proj": 1})
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.o_proj"
    tensors = {key: value for key, value in tensors.items() if not key.startswith(f"{name}.")}
    tensors[f"{name}.weight"] = load_file(dense / "model.safetensors")[f"{name}.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{name}\.weight is not quantized, and EXL3 files of MiMoV2FlashForCausalLM"):
        AutoModelForCausalLM.from_pretrained(folder)
