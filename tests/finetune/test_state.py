"""A run that was stopped goes on to the same result; another run, or a damaged file, is never taken for it."""

from __future__ import annotations

import copy
import logging

import pytest
import torch

from tests.finetune.conftest import IDS, pair
from transformers_quip.finetune import TuneOptions, record, tune_vectors
from transformers_quip.finetune import end_to_end as module
from transformers_quip.finetune.state import FILE

OPTIONS = TuneOptions(epochs=3, batch_size=4, held_out=8, learning_rate=2e-2, looks=4)


@pytest.fixture(scope="module")
def models():
    return pair("llama")


class Stopped(Exception):
    pass


def stop_after(monkeypatch, steps):
    """Raise after this many steps, as Ctrl-C would."""
    step, count = module._Trainer._step, [0]

    def limited(self, *args):
        if count[0] == steps:
            raise Stopped
        count[0] += 1
        step(self, *args)

    monkeypatch.setattr(module._Trainer, "_step", limited)
    return count


@pytest.mark.parametrize("steps", [0, 2, 3, 7, 11])
def test_a_stopped_run_goes_on_to_the_same_result(models, tmp_path, monkeypatch, steps):
    dense, model = models
    teacher, whole, stopped = record(dense, IDS), copy.deepcopy(model), copy.deepcopy(model)
    expected = tune_vectors(whole, teacher, OPTIONS, progress=False)
    with monkeypatch.context() as patch:
        stop_after(patch, steps)
        with pytest.raises(Stopped):
            tune_vectors(stopped, teacher, OPTIONS, state=tmp_path, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(stopped.parameters(), model.parameters(), strict=True))
    with monkeypatch.context() as patch:
        made = stop_after(patch, 100)
        found = tune_vectors(stopped, teacher, OPTIONS, state=tmp_path, progress=False)
    assert made[0] == 12 - steps // 3 * 3  # after the last look
    assert all(torch.equal(a, b) for a, b in zip(stopped.parameters(), whole.parameters(), strict=True))
    assert found.verdict == expected.verdict
    assert [look["held_out"] for look in found.history] == [look["held_out"] for look in expected.history]
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


@pytest.mark.parametrize("change", ["options", "text", "model", "codes"])
def test_another_run_starts_from_the_beginning(models, tmp_path, monkeypatch, caplog, change):
    dense, model = models[0], copy.deepcopy(models[1])
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        with pytest.raises(Stopped):
            tune_vectors(copy.deepcopy(model), record(dense, IDS), OPTIONS, state=tmp_path, progress=False)
    ids, options = IDS, OPTIONS
    if change == "options":
        options = TuneOptions(epochs=3, batch_size=4, held_out=8, learning_rate=1e-2, looks=4)
    elif change == "text":
        ids = IDS.flip(0)
    elif change == "model":
        model.model.norm.weight.data[0] += 1
    else:
        model.model.layers[0].mlp.down_proj.codes.data[0, 0] += 1
    made = stop_after(monkeypatch, 100)
    with caplog.at_level(logging.WARNING, logger="transformers_quip"):
        tune_vectors(model, record(dense, ids), options, state=tmp_path, progress=False)
    assert made[0] == 12
    assert "is of another model, text or options" in caplog.text
    named = {"options": "options.learning_rate was", "text": "text was", "model": "model was", "codes": "model was"}[change]
    assert named in caplog.text


def test_a_damaged_file(models, tmp_path):
    (tmp_path / FILE).write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="is damaged .* remove it to start from the beginning"):
        tune_vectors(copy.deepcopy(models[1]), record(models[0], IDS), OPTIONS, state=tmp_path, progress=False)
