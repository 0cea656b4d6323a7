"""What a model's own text is worth, against counts by hand and a model that cannot write."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from transformers.utils.logging import warning_once

from tests.models import tiny_ids, tiny_model
from transformers_quip.evaluation.generation import generation_quality, repeated_share


def test_repeated_share():
    assert repeated_share(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]])) == 0
    # pieces of 4: 1212 2121 1212 2121 1212: two different ones of five
    assert repeated_share(torch.tensor([[1, 2, 1, 2, 1, 2, 1, 2]])) == pytest.approx(3 / 5)
    # the same piece in another row is no repetition
    assert repeated_share(torch.tensor([[1, 2, 3, 4, 5], [1, 2, 3, 4, 5]])) == 0


def test_a_model_against_itself():
    model, prompts = tiny_model("llama"), tiny_ids(3, 5)
    state = torch.get_rng_state()
    found = generation_quality(model, model, prompts, length=12, seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert found.perplexity == found.own_perplexity
    assert found.repetition == found.own_repetition == repeated_share(found.greedy)
    token, ids = [], prompts
    for _ in range(12):
        token = model(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, token], 1)
    assert torch.equal(found.greedy, ids[:, 5:])


def test_no_warning_of_generate(caplog):
    """Settings that sampling needs are not given to greedy generation, which warns about them."""
    model, prompts = tiny_model("llama"), tiny_ids(2, 5)
    logger = logging.getLogger("transformers")
    warning_once.cache_clear()
    logger.addHandler(caplog.handler)
    try:
        generation_quality(model, model, prompts, length=8)
    finally:
        logger.removeHandler(caplog.handler)
    assert "generation flags" not in caplog.text


def test_a_model_that_writes_what_the_reference_finds_unlikely():
    """The judge is the reference: noise has about the perplexity of the vocabulary, its own text a lower one."""
    reference, prompts = tiny_model("llama"), tiny_ids(4, 5)
    with torch.no_grad():
        reference.lm_head.weight.mul_(3)  # a sharper model
    noise = tiny_model("llama")
    with torch.no_grad():
        noise.lm_head.weight.zero_()
    found = generation_quality(noise, reference, prompts, length=64)
    assert found.perplexity > 2 * found.own_perplexity
    assert found.own_perplexity < 128 < found.perplexity
    # argmax of equal logits is one token for ever: all pieces but the first are repeated
    assert found.repetition == pytest.approx(60 / 61)


def test_overflow_is_infinite():
    reference = tiny_model("llama")
    with torch.no_grad():
        reference.lm_head.weight.mul_(1e6)
    assert math.isinf(generation_quality(tiny_model("llama", seed=1), reference, tiny_ids(1, 4), length=8).perplexity)


def test_bad_values():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="length=7 must be at least 8"):
        generation_quality(model, model, tiny_ids(1, 4), length=7)
    with pytest.raises(TypeError, match="integer"):
        generation_quality(model, model, torch.ones(1, 4), length=8)
