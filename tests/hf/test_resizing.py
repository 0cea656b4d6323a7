"""resize_token_embeddings of a model with a quantized head or table: refused before anything is changed."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.models import VOCABULARY, save_tiny_model, tiny_ids, tiny_model
from transformers_quip import QuipConfig

HEAD, TABLE = {"lm_head": {"bits": 4}}, {"embed_tokens": {"bits": 4}}


def quantized(tmp_path, modules):
    config = QuipConfig(dataset=None, bits=4, modules=modules)
    return AutoModelForCausalLM.from_pretrained(save_tiny_model("llama", tmp_path), quantization_config=config)


@pytest.mark.parametrize(("modules", "name"), [(HEAD, "lm_head"), (TABLE, "model.embed_tokens")])
@pytest.mark.parametrize(
    ("arguments", "tokens"),
    [((100,), 100), ((140,), 140), ((None, 96), 192), ((120, 50), 150)],
    ids=["fewer", "more", "padded", "fewer, padded"],
)
def test_another_number_of_tokens_is_refused(modules, name, arguments, tokens, tmp_path):
    model = quantized(tmp_path, modules)
    before, parts = model(tiny_ids()).logits, dict(model.named_modules())
    message = rf"{name} is quantized: .* for {VOCABULARY} tokens, and cannot get {tokens}\..*call model.dequantize\(\)"
    with pytest.raises(ValueError, match=message):
        model.resize_token_embeddings(*arguments)
    assert dict(model.named_modules()) == parts
    assert model.config.vocab_size == VOCABULARY
    assert torch.equal(model(tiny_ids()).logits, before)
    assert model.dequantize().resize_token_embeddings(*arguments).weight.shape[0] == tokens
    assert model(tiny_ids() % 100).logits.shape[-1] == tokens


@pytest.mark.parametrize("arguments", [(), (VOCABULARY,), (None, 64), (120, 64)])
def test_the_number_that_it_has_is_welcome(arguments, tmp_path):
    model = quantized(tmp_path, HEAD | TABLE)
    before = model(tiny_ids()).logits
    assert model.resize_token_embeddings(*arguments) is model.model.embed_tokens
    assert torch.equal(model(tiny_ids()).logits, before)


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_dense_heads_and_tables_change_as_ever(arch, tmp_path):
    config = QuipConfig(dataset=None, bits=4)
    model = AutoModelForCausalLM.from_pretrained(save_tiny_model(arch, tmp_path), quantization_config=config)
    for some in (model, tiny_model(arch)):
        assert some.resize_token_embeddings(140, mean_resizing=False).weight.shape[0] == 140
        assert some(tiny_ids()).logits.shape[-1] == 140
