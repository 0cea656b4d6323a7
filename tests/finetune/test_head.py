"""Logits from hidden states, and KL divergences without a graph of logits, against autograd in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.models import tiny_ids, tiny_model
from transformers_quip.evaluation.kept import LogitMap, logit_map
from transformers_quip.finetune.head import Head, divergence_per_token, divergence_sum

GENERATOR = torch.Generator().manual_seed(0)
HIDDEN, STATES = (torch.randn(23, 12, generator=GENERATOR, dtype=torch.float64) for _ in range(2))
WEIGHT, OTHER = (torch.randn(31, 12, generator=GENERATOR, dtype=torch.float64) for _ in range(2))


def truth(hidden, weight, scale=1.0, cap=None, reverse=0.0):
    """Σ of the shares of both KL divergences by the formula, with a graph."""

    def logits(h, w):
        z = h @ w.T * scale
        return z if cap is None else cap * torch.tanh(z / cap)

    p, q = logits(STATES, OTHER).softmax(-1), logits(hidden, weight).log_softmax(-1)
    return (1 - reverse) * (p * (p.log() - q)).sum() + reverse * (q.exp() * (q - p.log())).sum()


def heads(scale=1.0, cap=None, weight=WEIGHT):
    logits = LogitMap(scale, cap)
    return Head(lambda h: h @ weight.to(h).T, logits), Head(lambda h: h @ OTHER.to(h).T, logits)


@pytest.mark.parametrize("reverse", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.25, None), (1.0, 2.0), (2.0, 5.0)])
def test_divergence_and_gradient(scale, cap, reverse):
    hidden = HIDDEN.clone().requires_grad_()
    found = divergence_sum(hidden, STATES, *heads(scale, cap), reverse)
    (found * 3).backward()
    exact = HIDDEN.clone().requires_grad_()
    expected = truth(exact, WEIGHT, scale, cap, reverse)
    (expected * 3).backward()
    # logits are taken to float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden.grad, exact.grad, rtol=1e-4, atol=1e-4)
    each = divergence_per_token(HIDDEN, STATES, *heads(scale, cap))
    torch.testing.assert_close(each.double().sum(), truth(HIDDEN, WEIGHT, scale, cap), rtol=1e-5, atol=1e-5)


def test_a_head_that_is_trained():
    linear = nn.Linear(12, 31, bias=False, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(WEIGHT)
    divergence_sum(HIDDEN, STATES, Head(linear, LogitMap()), heads()[1]).backward()
    weight = WEIGHT.clone().requires_grad_()
    truth(HIDDEN, weight).backward()
    torch.testing.assert_close(linear.weight.grad, weight.grad, rtol=1e-4, atol=1e-4)


def test_a_token_that_the_teacher_rules_out_costs_nothing():
    p = torch.tensor([[0.0, -torch.inf, 0.0]])
    identity = Head(lambda h: h, LogitMap())
    assert divergence_per_token(torch.zeros(1, 3), p, identity, identity).item() == pytest.approx(torch.tensor(1.5).log())
    # in the other direction it would cost infinitely much, so it does not count: 2 tokens of 3 with chances 1/3 and 1/2
    hidden = torch.zeros(1, 3, requires_grad=True)
    loss = divergence_sum(hidden, p, identity, identity, 1.0)
    loss.backward()
    assert loss.item() == pytest.approx(2 / 3 * torch.tensor(2 / 3).log())
    assert hidden.grad.isfinite().all()


@pytest.mark.parametrize(
    ("arch", "changes", "expected"),
    [
        ("llama", {}, LogitMap()),
        ("gpt2", {}, LogitMap()),
        ("gemma3", {"final_logit_softcapping": 3.0}, LogitMap(1.0, 3.0)),
    ],
)
def test_what_a_model_does_to_its_logits(arch, changes, expected):
    assert logit_map(tiny_model(arch, **changes), tiny_ids(1, 6)) == expected


def test_an_unknown_way_is_refused():
    model = tiny_model("llama")
    forward = model.forward

    def changed(*args, **kwargs):
        result = forward(*args, **kwargs)
        result.logits = result.logits.square()
        return result

    model.forward = changed
    with pytest.raises(ValueError, match="LlamaForCausalLM computes its logits"):
        logit_map(model, tiny_ids(1, 6))
