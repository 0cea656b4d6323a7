"""A model through every codebook: quantize with and without calibration, save, reload, dequantize."""

import itertools
import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from tests.models import tiny_ids
from transformers_quip import QuipConfig, codebooks
from transformers_quip.evaluation.size import true_bits_per_weight
from transformers_quip.nn.replace import quantized_linears

BITS = {"e8p": 2, "d4": 2, "scalar2": 2, "e8p-rvq3": 3, "scalar3": 3, "e8p-rvq4": 4, "half-integer": 4, "scalar4": 4}
BITS["scalar8"] = 8


@pytest.mark.parametrize("codebook", BITS)
@torch.no_grad()
def test_without_calibration(codebook, dense, ids, tmp_path):
    config = QuipConfig(codebook=codebook, dataset=None)
    assert config.bits == BITS[codebook]
    model = AutoModelForCausalLM.from_pretrained(dense("gpt2"), quantization_config=config)
    logits = model(ids).logits
    original = AutoModelForCausalLM.from_pretrained(dense("gpt2"))
    for name, linear in quantized_linears(model).items():
        weight = original.get_submodule(name).weight.T
        lost = ((linear.dequantize() - weight).square().sum() / weight.square().sum()).item()
        # what the rate allows at best, and half as much again as the worst codebook of this rate loses on a Gaussian
        assert 0.9 * 4.0 ** -BITS[codebook] < lost < 1.5 * max(0.12 * 3.2 ** (2 - BITS[codebook]), 1e-4), name
        # two float32 vectors to a weight of 64 columns and more
        assert BITS[codebook] < linear.true_bits < BITS[codebook] + 32 * (1 / 64 + 1 / 64) + 0.1
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (saved["bits"], saved["codebook"]) == (BITS[codebook], codebook)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        two = any(key.endswith("codes_residual") for key in file.keys())  # noqa: SIM118 - no mapping
    assert two == (codebooks.get(codebook).residual_scale is not None)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(reloaded(ids).logits, logits)
    assert true_bits_per_weight(reloaded) == true_bits_per_weight(model)
    torch.testing.assert_close(reloaded.dequantize()(ids).logits, logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bits", [3, 4])
@torch.no_grad()
def test_calibrated_sharded_and_in_bfloat16(bits, dense, ids, tmp_path):
    config = QuipConfig(bits=bits, dataset=tiny_ids(4, 16, seed=5), num_samples=4, sequence_length=16, refinement_sweeps=1)
    assert config.codebook == f"e8p-rvq{bits}"
    model = AutoModelForCausalLM.from_pretrained(dense("llama"), quantization_config=config)
    errors = [record["relative_error"] for record in model.hf_quantizer.report.modules]
    assert max(errors) < 0.12 / 3 ** (bits - 2)
    logits = model(ids).logits
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, logits)
    halved = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(halved.model.layers[0].mlp.up_proj.codes_residual, model.model.layers[0].mlp.up_proj.codes_residual)
    torch.testing.assert_close(halved(ids).logits.float(), logits, rtol=0.1, atol=0.1 * logits.abs().max().item())


@torch.no_grad()
def test_a_residual_scale_is_kept(dense, ids, tmp_path):
    config = QuipConfig(bits=4, dataset=None, residual_scale=0.25)
    model = AutoModelForCausalLM.from_pretrained(dense("llama"), quantization_config=config)
    assert model.model.layers[0].mlp.up_proj.codebook == "e8p-rvq4@0.25"
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert reloaded.config.quantization_config.residual_scale == 0.25
    assert torch.equal(reloaded(ids).logits, model(ids).logits)


@torch.no_grad()
def test_a_residual_scale_of_single_modules(dense, ids, tmp_path):
    modules = {"*.up_proj": {"residual_scale": 0.25}, "*.down_proj": {"bits": 2}, "*.q_proj": {"codebook": "scalar3"}}
    config = QuipConfig(bits=4, dataset=None, residual_scale=0.3, modules=modules)
    model = AutoModelForCausalLM.from_pretrained(dense("llama"), quantization_config=config)
    layer = model.model.layers[1]
    assert (layer.mlp.up_proj.codebook, layer.mlp.gate_proj.codebook) == ("e8p-rvq4@0.25", "e8p-rvq4@0.3")
    assert (layer.mlp.down_proj.codebook, layer.self_attn.q_proj.codebook) == ("e8p", "scalar3")
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


def test_more_bits_lose_less(dense, ids):
    original = AutoModelForCausalLM.from_pretrained(dense("llama"))(ids).logits
    lost = []
    for bits in (2, 3, 4, 8):
        config = QuipConfig(bits=bits, dataset=None)
        logits = AutoModelForCausalLM.from_pretrained(dense("llama"), quantization_config=config)(ids).logits
        lost.append((logits - original).square().mean().item())
    assert all(more < 0.6 * less for less, more in itertools.pairwise(lost))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"bits": 2, "residual_scale": 0.5},
            "needs a codebook of two stages, and codebook='e8p' has one; choose one of",
        ),
        ({"bits": 4, "residual_scale": 0}, "residual_scale=0 must be None or a finite number other than 0"),
        ({"bits": 4, "residual_scale": float("inf")}, "must be None or a finite number"),
        ({"bits": 4, "residual_scale": "0.5"}, "must be None or a finite number"),
        ({"bits": 3, "codebook": "d4"}, "which has 2 bits, contradict each other; codebooks of 3 bits: 'e8p-rvq3'"),
    ],
)
def test_options_that_contradict_each_other(options, said):
    with pytest.raises(ValueError, match=said):
        QuipConfig(**options)
