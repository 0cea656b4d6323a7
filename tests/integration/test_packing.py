"""A model whose codes lie in the layout of the Triton kernels, from loading to saving; the CPU stands for the GPU."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from transformers_quip import QuipConfig
from transformers_quip.codebooks import implementation
from transformers_quip.nn.replace import quantized_linears
from transformers_quip.ops import backend

PARTS = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0"]
DISK = {**dict.fromkeys(PARTS, "cpu"), "model.layers.1": "disk"}


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Kernels themselves need the interpreter; here the ops compute by the reference, from either layout."""
    monkeypatch.setattr(implementation, "_chosen", lambda device: device.type)  # of the encoders
    with backend.overridden(devices={"cpu": "triton"}):
        yield


def packed(model):
    return {module.is_packed for module in quantized_linears(model).values()}


@torch.no_grad()
def test_a_model_is_packed_when_loaded_and_saved_as_ever(on_a_gpu, dense, quantized, ids, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(quantized("llama"))
    assert packed(model) == {True}
    logits = model(ids).logits
    model.save_pretrained(tmp_path)
    assert packed(model) == {True}
    while_loading = AutoModelForCausalLM.from_pretrained(dense("llama"), quantization_config=QuipConfig(dataset=None))
    assert packed(while_loading) == {True}
    assert torch.equal(while_loading(ids).logits, logits)
    with backend.overridden(devices={"cpu": "reference"}):
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert packed(reloaded) == {False}
        assert torch.equal(reloaded(ids).logits, logits)
        for name, parameter in reloaded.state_dict().items():
            assert torch.equal(model.state_dict()[name], parameter)
        assert torch.equal(copy.deepcopy(model)(ids).logits, logits)
        assert torch.equal(model.dequantize().lm_head.weight, reloaded.lm_head.weight)


@torch.no_grad()
def test_offloaded_modules_are_not_packed(on_a_gpu, quantized, ids, tmp_path):
    logits = AutoModelForCausalLM.from_pretrained(quantized("llama"))(ids).logits
    model = AutoModelForCausalLM.from_pretrained(quantized("llama"), device_map=DISK, offload_folder=tmp_path)
    assert packed(model.model.layers[0]) == {True}
    for _ in range(2):  # hooks bring the codes of the second block for each call
        assert torch.equal(model(ids).logits, logits)
    assert packed(model.model.layers[1]) == {False}


def test_a_compiled_model_uses_the_codes_as_they_lie(on_a_gpu, quantized, ids):
    model = AutoModelForCausalLM.from_pretrained(quantized("llama"))
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    assert packed(model) == {True}
