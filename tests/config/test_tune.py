"""The option `tune`: what it takes, and what its errors say."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from transformers_quip.config.tune import TuneOptions


def test_forms():
    assert TuneOptions.parse("vectors") == TuneOptions()
    assert TuneOptions.parse(None).mode == TuneOptions.parse("none").mode == "none"
    assert TuneOptions.parse({"epochs": 3}).epochs == 3
    assert TuneOptions.parse(TuneOptions(seed=4)).seed == 4
    assert TuneOptions.parse(TuneOptions(seed=4).to_dict()) == TuneOptions(seed=4)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("all", "tune='all' is not known"),
        ({"epoch": 3}, "no option 'epoch'"),
        ({"epochs": 0}, "epochs=0 must be a number above 0"),
        ({"epochs": float("inf")}, "epochs=inf must be a number above 0"),
        ({"batch_size": 2.5}, "batch_size=2.5 must be an integer"),
        ({"batch_size": True}, "batch_size=True must be an integer"),
        ({"held_out": 1}, "held_out=1 must be an integer of at least 2"),
        ({"learning_rate": "1"}, "learning_rate='1' must be a number"),
        ({"norms": 1}, "norms=1 must be True or False"),
        (7, "tune=7 must be one of"),
    ],
)
def test_bad_values(value, message):
    with pytest.raises(ValueError, match=message):
        TuneOptions.parse(value)


def test_schedule():
    options = TuneOptions(warmup=4)
    factors = [options.factor(step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(0.25)
    assert max(factors) == factors[3] == pytest.approx(0.5 * (1 + math.cos(0.03 * math.pi)))
    assert all(a > b for a, b in pairwise(factors[3:]))
    assert factors[-1] < 0.001
    assert TuneOptions(epochs=1.5, batch_size=4).steps(16) == 6
