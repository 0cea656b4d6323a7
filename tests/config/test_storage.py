"""The record of unusual storage in a config: what is valid, and that it survives JSON with sorted keys."""

from __future__ import annotations

import json

import pytest

from transformers_quip import QuipConfig
from transformers_quip.config.storage import PLAIN, Storage

STORED = (
    Storage(padded=(512, 128), scales_dtype="float32"),
    Storage(row_scales=True),
    Storage(fuses=("up_proj", "gate_proj")),
    Storage(parts=(("q_proj", 64), ("k_proj", 32), ("v_proj", 32))),
)


@pytest.mark.parametrize("storage", STORED)
def test_round_trip(storage):
    values = json.loads(json.dumps(storage.to_dict(), sort_keys=True))
    assert Storage.from_dict(values) == storage
    assert Storage.from_dict(values).to_dict() == values


def test_a_plain_one_is_not_written():
    assert PLAIN.to_dict() == {}
    assert "layout" not in QuipConfig().to_dict()


def test_of_a_module():
    config = QuipConfig(dataset=None)
    config.storage = {"*": {"scales_dtype": "float32"}, "*.down_proj": {"padded": [512, 128]}}
    saved = json.loads(json.dumps(config.to_dict(), sort_keys=True))
    again = QuipConfig.from_dict(saved)
    assert again.storage_of("model.layers.3.mlp.down_proj") == STORED[0]
    assert again.storage_of("model.layers.3.mlp.up_proj") == Storage(scales_dtype="float32")
    assert QuipConfig().storage_of("lm_head") is PLAIN


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], "must be a dict"),
        ({"": {}}, "must be a dict"),
        ({"*": 3}, "which must be a dict"),
        ({"*": {"pad": [1, 2]}}, "not 'pad'"),
        ({"*": {"padded": [0, 2]}}, "two positive integers"),
        ({"*": {"padded": 2}}, "two positive integers"),
        ({"*": {"row_scales": 1}}, "must be true or false"),
        ({"*": {"scales_dtype": "int8"}}, "'int8' must be one of"),
        ({"*": {"fuses": "q_proj"}}, "must be a list of names"),
        ({"*": {"parts": {"q_proj": 64}}}, "list of [name, outputs]"),
        ({"*": {"parts": [["q_proj", 0]]}}, "list of [name, outputs]"),
    ],
)
def test_what_is_not_valid(record, message):
    saved = QuipConfig().to_dict() | {"layout": record}
    with pytest.raises(ValueError, match="newer transformers-quip") as caught:
        QuipConfig.from_dict(saved)
    assert message in str(caught.value)
