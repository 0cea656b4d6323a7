"""Perplexity against the formula in float64, against models whose answer is known, and on bad input."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.models import VOCABULARY, tiny_ids, tiny_model
from transformers_quip.evaluation import perplexity


class FixedScores(nn.Module):
    """A language model whose logits depend on the current token only: row t of `table` [V, V]."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(table)
        self.batches = []

    @property
    def device(self):
        return self.table.device

    def forward(self, input_ids, use_cache=None):
        self.batches.append(input_ids)
        return SimpleNamespace(logits=self.table[input_ids])


def formula(logits, ids):
    """exp of the mean of log sum exp(s) - s[next token], in float64; logits [N, L, V], ids [N, L]."""
    losses = []
    for scores, window in zip(logits.double(), ids, strict=True):
        for position in range(len(window) - 1):
            row = scores[position]
            losses.append(math.log(row.exp().sum().item()) - row[window[position + 1]].item())
    return math.exp(sum(losses) / len(losses))


def test_uniform_scores_give_the_size_of_the_vocabulary():
    model = FixedScores(torch.zeros(50, 50))
    assert perplexity(model, torch.randint(50, (3, 9))) == pytest.approx(50, rel=1e-6)


def test_a_sure_model_that_is_right_gives_one():
    table = torch.full((7, 7), -1e4)
    for token in range(7):
        table[token, (token + 1) % 7] = 1e4
    ids = (torch.arange(12) % 7).repeat(2, 1)
    assert perplexity(FixedScores(table), ids) == 1.0
    assert perplexity(FixedScores(table), ids.flip(1)) == math.inf


@pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
def test_equals_the_formula(batch_size):
    model, ids = tiny_model("llama"), tiny_ids(5, 12)
    with torch.no_grad():
        expected = formula(model.double()(ids).logits, ids)
    assert perplexity(model.float(), ids, batch_size=batch_size) == pytest.approx(expected, rel=1e-5)


def test_low_precision_logits_are_summed_in_float32():
    model, ids = tiny_model("llama", dtype=torch.bfloat16), tiny_ids(4, 32)
    with torch.no_grad():
        expected = formula(model(ids).logits, ids)
    assert perplexity(model, ids) == pytest.approx(expected, rel=1e-5)


def test_bos_is_read_but_not_predicted():
    model, ids = tiny_model("gemma3"), tiny_ids(2, 10)
    with_bos = torch.cat([torch.ones(2, 1, dtype=torch.long), ids], dim=1)
    with torch.no_grad():
        expected = formula(model(with_bos).logits[:, 1:], ids)
    assert perplexity(model, ids, bos=1) == pytest.approx(expected, rel=1e-4)
    assert perplexity(model, ids, bos=1) != pytest.approx(perplexity(model, ids), rel=1e-4)


def test_every_window_is_read_once_in_order():
    model = FixedScores(torch.randn(20, 20))
    ids = torch.randint(20, (5, 6), dtype=torch.int32)
    perplexity(model, ids, batch_size=2)
    assert [len(batch) for batch in model.batches] == [2, 2, 1]
    assert torch.equal(torch.cat(model.batches), ids.long())


def test_dropout_is_off_and_the_mode_is_restored():
    model, ids = tiny_model("gpt2", resid_pdrop=0.5), tiny_ids(2, 12)
    expected = perplexity(model, ids)
    model.train()
    assert perplexity(model, ids) == expected
    assert model.training


def test_logits_that_are_not_finite_give_nan():
    assert math.isnan(perplexity(FixedScores(torch.full((4, 4), float("nan"))), torch.zeros(1, 3, dtype=torch.long)))


@pytest.mark.parametrize("ids", [torch.zeros(2, 8), [[1, 2, 3]], torch.ones(2, 8, dtype=torch.bool)])
def test_ids_must_be_integers(ids):
    with pytest.raises(TypeError, match="integer tensor"):
        perplexity(tiny_model("llama"), ids)


@pytest.mark.parametrize("shape", [(8,), (0, 8), (2, 1), (1, 2, 3)])
def test_ids_must_be_windows(shape):
    with pytest.raises(ValueError, match="N >= 1 and L >= 2"):
        perplexity(tiny_model("llama"), torch.zeros(shape, dtype=torch.long))


def test_batch_size_must_be_positive():
    with pytest.raises(ValueError, match="batch_size"):
        perplexity(tiny_model("llama"), tiny_ids(), batch_size=0)


def test_random_ids_are_about_as_surprising_as_the_vocabulary_is_large():
    # logits of the tiny models are about N(0, 1), so exp(mean loss) is about V exp(1/2)
    found = perplexity(tiny_model("llama"), tiny_ids(8, 64))
    assert VOCABULARY < found < 3 * VOCABULARY
