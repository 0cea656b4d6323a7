"""The teacher's states on disk: used again only where they are those of this model and this text."""

from __future__ import annotations

import pytest
import torch

from tests.models import tiny_ids, tiny_model
from transformers_quip.finetune import teacher as module
from transformers_quip.finetune.teacher import record

IDS = tiny_ids(6, 9).clamp_max(126)


@pytest.fixture
def runs(monkeypatch):
    """Counts the windows that are read to fill a file."""
    counted, fill = [], module._fill

    def counting(states, model, ids, *rest):
        counted.append(len(ids))
        return fill(states, model, ids, *rest)

    monkeypatch.setattr(module, "_fill", counting)
    return counted


def test_states_make_the_models_logits():
    model = tiny_model("llama")
    teacher = record(model, IDS, progress=False)
    assert teacher.states.shape == (6, 9, 64)
    with torch.no_grad():
        found = teacher.head()(teacher.states[2].float())
        expected = model(input_ids=IDS[2:3]).logits[0]
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.05)


def test_a_file_is_used_again(tmp_path, runs):
    model, path = tiny_model("llama"), tmp_path / "deep" / "states.bin"
    first = record(model, IDS, path, progress=False)
    again = record(model, IDS, path, progress=False)
    assert runs == [6]
    assert torch.equal(first.states, again.states)
    assert path.stat().st_size == 6 * 9 * 64 * 2


def test_other_text_other_weights_and_an_unfinished_file_are_read_again(tmp_path, runs):
    path = tmp_path / "states.bin"
    record(tiny_model("llama"), IDS, path, progress=False)
    record(tiny_model("llama"), IDS + 1, path, progress=False)
    other = tiny_model("llama", seed=4)
    found = record(other, IDS + 1, path, progress=False)
    assert runs == [6, 6, 6]
    assert torch.equal(found.states, record(other, IDS + 1, progress=False).states)
    path.with_suffix(".json").unlink()  # as after a kill: it is written last
    record(other, IDS + 1, path, progress=False)
    assert runs == [6] * 5


def test_states_that_are_not_finite():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match="NaN or Inf|unknown way"):
        record(model, IDS, progress=False)
