"""Padding without a mask: what counts as padding, and what does not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.models import tiny_ids, tiny_model
from transformers_quip import QuipConfig
from transformers_quip.calibration.forms import Row
from transformers_quip.calibration.padding import Unpadding
from transformers_quip.quantize.recipe import quantize_model

BOS, EOS, PAD = 1, 2, 0


def strip(rows, pads=(PAD,), marks=(BOS, EOS), caplog=None):
    unpadding = Unpadding(set(pads), set(marks))
    result = [ids.tolist() for ids in unpadding.strip([Row("", ids=torch.tensor(row)) for row in rows])]
    unpadding.report()
    return result


def test_the_pad_token_is_cut_at_both_ends_and_kept_inside(caplog):
    assert strip([[0, 0, 5, 0, 6], [7, 8, 9, 4, 0], [0, 0, 0, 0, 0], [5, 6, 7, 8, 9]]) == [
        [5, 0, 6],
        [7, 8, 9, 4],
        [5, 6, 7, 8, 9],
    ]
    assert "8 times token 0" in caplog.text
    assert "attention_mask" in caplog.text


def test_a_pad_token_that_ends_texts_keeps_one(caplog):
    assert strip([[5, 6, 2, 2, 2], [5, 6, 7, 8, 2], [2, 2, 2, 2, 2]], pads=[EOS]) == [[5, 6, 2], [5, 6, 7, 8, 2]]
    assert "7 times token 2" in caplog.text


@pytest.mark.parametrize("pads", [(), (PAD,)])
def test_the_token_that_half_of_the_rows_repeat_is_padding_whatever_its_name(pads):
    assert strip([[9, 9, 5, 6], [9, 9, 9, 5], [9, 5, 6, 7], [5, 6, 7, 8]], pads) == [
        [5, 6],
        [5],
        [5, 6, 7],
        [5, 6, 7, 8],
    ]


@pytest.mark.parametrize(
    "rows",
    [
        [[5, 6, 7, 7], [5, 6, 7, 8], [6, 7, 8, 9]],  # one row of three
        [[5, 5, 5], [5, 5, 5]],  # nothing but one token
        [[5, 6, 8, 8]],  # one row says nothing
        [[5, 6, 7], [6, 5, 7]],  # ends alike, but is not repeated
    ],
)
def test_what_is_not_padding_stays(rows, caplog):
    assert strip(rows) == rows
    assert not caplog.text


def test_a_mask_decides_alone(caplog):
    row = Row("", ids=torch.tensor([5, 0, 0]), mask=torch.tensor([True, True, False]))
    assert [ids.tolist() for ids in Unpadding({0}, set()).strip([row])] == [[5, 0]]
    assert not caplog.text


def test_the_pad_tokens_of_model_and_tokenizer_are_known():
    model = tiny_model("llama")
    tokenizer = SimpleNamespace(pad_token_id=77, eos_token_id=None)
    rows = [Row("", ids=torch.tensor([5, 6, 77])), Row("", ids=torch.tensor([7, 0]))]
    assert [ids.tolist() for ids in Unpadding.of(model, tokenizer).strip(rows)] == [[5, 6], [7]]


def test_padded_rows_quantize_as_the_same_rows_without_padding():
    ids = tiny_ids(64, 4, seed=3)
    padded = torch.cat([ids, torch.zeros(64, 28, dtype=torch.long)], dim=1)
    mask = (padded != 0).long()
    packed = ids.reshape(-1, 32)
    weights = []
    for dataset in (packed, padded, {"input_ids": padded.flip(0).flip(0), "attention_mask": mask}):
        model = tiny_model("llama")
        quantize_model(model, QuipConfig(dataset=dataset, num_samples=64, sequence_length=32, refinement_sweeps=1))
        weights.append(model.model.layers[1].mlp.down_proj.dequantize())
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])
