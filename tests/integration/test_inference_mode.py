"""Quantized inside torch.inference_mode(), a model can be used outside, with gradients on."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.models import tiny_ids, tiny_model
from transformers_quip import QuipConfig
from transformers_quip.quantize.recipe import quantize_model

EMBEDDINGS = {"embed_tokens": {"bits": 4}, "lm_head": {"bits": 4}}


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 4, "dataset": None},
        {"bits": 4, "dataset": None, "modules": EMBEDDINGS},
        {"bits": 2.5, "dataset": tiny_ids(6, 16), "num_samples": 6, "sequence_length": 16},
        {"bits": 4, "dataset": tiny_ids(6, 16), "num_samples": 6, "sequence_length": 16, "modules": EMBEDDINGS},
        {"bits": 4, "num_samples": 2, "sequence_length": 16},
    ],
    ids=["no data", "no data, embeddings", "average bits", "embeddings", "self"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_usable_outside(options, dtype, dense):
    config = QuipConfig(**options)
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(dense("llama"), quantization_config=config, dtype=dtype)
        expected = model(tiny_ids()).logits
    assert not any(tensor.is_inference() for tensor in model.state_dict().values())
    logits = model(tiny_ids()).logits
    torch.testing.assert_close(logits, expected, rtol=1e-2, atol=1e-2)
    logits.square().mean().backward()
    assert model.model.norm.weight.grad.abs().sum() > 0


def test_a_model_from_outside_is_quantized_inside():
    model, reference = tiny_model("gpt2"), tiny_model("gpt2")
    config = QuipConfig(bits=2, dataset=tiny_ids(6, 16), num_samples=6, sequence_length=16)
    with torch.inference_mode():
        quantize_model(model, config)
    quantize_model(reference, config)
    for (name, tensor), other in zip(model.state_dict().items(), reference.state_dict().values(), strict=True):
        assert not tensor.is_inference(), name
        assert torch.equal(tensor, other)
    model(tiny_ids()).logits.square().mean().backward()


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_dequantized_inside(quantized, dtype):
    model = AutoModelForCausalLM.from_pretrained(quantized("llama"))
    with torch.inference_mode():
        model = model.dequantize(dtype)
    assert not any(tensor.is_inference() for tensor in model.state_dict().values())
    weight = model.model.layers[0].mlp.up_proj.weight.requires_grad_()
    model(tiny_ids()).logits.square().mean().backward()
    assert weight.grad.abs().sum() > 0
