"""Bad calibration data: one clear error before the first weight is quantized."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.models import POSITIONS, VOCABULARY, tiny_ids, tiny_tokenizer
from transformers_quip import QuipConfig
from transformers_quip.quantize import block


class Begun(Exception):
    """The first weight is about to be quantized."""


@pytest.fixture
def quantize(dense, monkeypatch):
    """quantize(**options): a calibrated run of a folder without tokenizer, as far as the first weight."""

    def begin(*args, **kwargs):
        raise Begun

    monkeypatch.setattr(block, "quantize_weights", begin)

    def run(**options):
        config = QuipConfig(**{"num_samples": 2, "sequence_length": 16, **options})
        return AutoModelForCausalLM.from_pretrained(dense("llama"), quantization_config=config)

    return run


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dataset": ["some text"]}, "needs a tokenizer.*tokenizer=.*dataset='self'"),
        ({"dataset": ["some text"], "tokenizer": "no/such/folder"}, "needs a tokenizer.*no/such/folder"),
        ({"dataset": ["", " "], "tokenizer": tiny_tokenizer()}, "dataset is empty"),
        ({"dataset": "wikitext2", "tokenizer": tiny_tokenizer()}, "dataset='wikitext2' could not be loaded"),
        ({"dataset": torch.full((2, 16), VOCABULARY)}, f"token id {VOCABULARY}, outside the model's vocabulary"),
    ],
)
def test_data_that_cannot_be_used(quantize, options, said):
    with pytest.raises(ValueError, match=said):
        quantize(**options)


def test_texts_with_a_tokenizer_begin(quantize):
    with pytest.raises(Begun):
        quantize(dataset=["some text, long enough for two samples"], tokenizer=tiny_tokenizer())


def test_sequences_longer_than_the_positions_are_cut(quantize, caplog):
    with pytest.raises(Begun):
        quantize(dataset=tiny_ids(2, 2 * POSITIONS), sequence_length=2 * POSITIONS)
    assert f"more than the {POSITIONS} positions" in caplog.text
