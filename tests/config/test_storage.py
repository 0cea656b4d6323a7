"""The record of layouts in a config: what is valid, and that it survives JSON with sorted keys."""

from __future__ import annotations

import json

import pytest

from transformers_quip import QuipConfig
from transformers_quip.config.storage import PLAIN, Layout

LAYOUTS = (
    Layout(padded=(512, 128), scales_dtype="float32"),
    Layout(row_scales=True),
    Layout(fuses=("up_proj", "gate_proj")),
    Layout(parts=(("q_proj", 64), ("k_proj", 32), ("v_proj", 32))),
)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip(layout):
    values = json.loads(json.dumps(layout.to_dict(), sort_keys=True))
    assert Layout.from_dict(values) == layout
    assert Layout.from_dict(values).to_dict() == values


def test_a_plain_one_is_not_written():
    assert PLAIN.to_dict() == {}
    assert "layout" not in QuipConfig().to_dict()


def test_of_a_module():
    config = QuipConfig(dataset=None)
    config.layout = {"*": {"scales_dtype": "float32"}, "*.down_proj": {"padded": [512, 128]}}
    saved = json.loads(json.dumps(config.to_dict(), sort_keys=True))
    again = QuipConfig.from_dict(saved)
    assert again.layout_of("model.layers.3.mlp.down_proj") == LAYOUTS[0]
    assert again.layout_of("model.layers.3.mlp.up_proj") == Layout(scales_dtype="float32")
    assert QuipConfig().layout_of("lm_head") is PLAIN


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], "must be a dict"),
        ({"": {}}, "must be a dict"),
        ({"*": 3}, "which is no dict"),
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
