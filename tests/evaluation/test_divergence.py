"""KL divergence and agreement against the formula, position by position in float64."""

from __future__ import annotations

import math

import pytest
import torch

from tests.models import tiny_ids, tiny_model
from transformers_quip.evaluation import divergence, keep_predictions
from transformers_quip.evaluation.kept import UnknownHead


def by_hand(model, reference, ids, bos=None):
    """Σ p (log p - log q) for every position, and whether both find the same token likeliest."""
    values, same = [], []
    for window in ids:
        inputs = window[None] if bos is None else torch.cat([torch.tensor([bos]), window])[None]
        with torch.no_grad():
            q = model(inputs).logits[0].double().softmax(-1)
            p = reference(inputs).logits[0].double().softmax(-1)
        skip = 0 if bos is None else 1
        for position in range(skip, skip + len(window) - 1):
            values.append((p[position] * (p[position].log() - q[position].log())).sum().item())
            same.append((p[position].argmax() == q[position].argmax()).item())
    return values, same


@pytest.mark.parametrize("bos", [None, 1])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_against_the_formula(batch_size, bos):
    model, reference, ids = tiny_model("llama", seed=1), tiny_model("llama", seed=2), tiny_ids(3, 9)
    values, same = by_hand(model, reference, ids, bos)
    result = divergence(model, reference, ids, batch_size, bos)
    assert result.positions == len(values) == 3 * 8
    assert result.mean == pytest.approx(sum(values) / len(values), rel=1e-5)
    assert result.median == pytest.approx(sorted(values)[(len(values) - 1) // 2], rel=1e-4)
    assert result.percentile_99 == pytest.approx(max(values), rel=1e-4)
    assert result.top1_agreement == sum(same) / len(same)


def test_a_model_does_not_differ_from_itself():
    model = tiny_model("gpt2").train()
    result = divergence(model, model, tiny_ids(2, 5))
    assert result.mean == pytest.approx(0, abs=1e-6)
    assert result.top1_agreement == 1
    assert model.training


def test_a_token_that_the_reference_rules_out_costs_nothing():
    model, reference = tiny_model("llama", seed=1), tiny_model("llama", seed=1)

    def rule_out(module, args, output):
        output.logits[..., 7] = -math.inf

    reference.register_forward_hook(rule_out)
    with torch.no_grad():
        q = model(tiny_ids(1, 2)).logits[0, 0].double().softmax(-1)[7].item()
    # p is q without token 7, scaled up: KL = -log(1 - q7)
    assert divergence(model, reference, tiny_ids(1, 2)).mean == pytest.approx(-math.log(1 - q), rel=1e-3)


def test_bad_input():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="128 and 64 tokens"):
        divergence(model, tiny_model("llama", vocab_size=64), tiny_ids(1, 4) % 64)
    with pytest.raises(TypeError, match="integer tensor"):
        divergence(model, model, torch.rand(1, 4))
    with pytest.raises(ValueError, match="L >= 2"):
        divergence(model, model, tiny_ids(1, 1))


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3", "opt"])
@pytest.mark.parametrize("kept", ["model", "reference"])
def test_kept_predictions_are_those_of_the_model(arch, kept):
    changes = {"final_logit_softcapping": 3.0} if arch == "gemma3" else {}
    pair = {"model": tiny_model(arch, seed=1, **changes), "reference": tiny_model(arch, seed=2, **changes)}
    ids = tiny_ids(5, 9)
    values, same = by_hand(pair["model"], pair["reference"], ids, bos=1)
    pair[kept] = keep_predictions(pair[kept], torch.nn.functional.pad(ids, (1, 0), value=1), batch_size=2)
    result = divergence(pair["model"], pair["reference"], ids, batch_size=3, bos=1)
    assert result.mean == pytest.approx(sum(values) / len(values), rel=1e-4)
    assert result.top1_agreement == sum(same) / len(same)


def test_kept_predictions_do_not_follow_the_model():
    model, ids = tiny_model("llama"), tiny_ids(2, 5)
    kept, before = keep_predictions(model, ids), model(ids).logits.detach()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(kept.logits(0, 2), before)


def test_a_model_without_a_known_head():
    model = tiny_model("llama")
    with pytest.raises(UnknownHead, match="LlamaModel has no language modelling head"):
        keep_predictions(model.model, tiny_ids(1, 4))
