"""Saving a model: whenever the process is killed, the folder holds the old model, the new one, or none."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.models import save_tiny_model, tiny_ids
from transformers_quip import QuipConfig
from transformers_quip.hf import replacing

SHARD = "20KB"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models whose tensors have the same names and shapes."""
    dense = save_tiny_model("llama", tmp_path_factory.mktemp("dense"))
    configs = [QuipConfig(dataset=None, incoherence=kind) for kind in ("hadamard", "none")]
    return [AutoModelForCausalLM.from_pretrained(dense, quantization_config=config) for config in configs]


@torch.no_grad()
def logits(model):
    return model(tiny_ids()).logits


def killed_at(step, model, folder, **options):
    """Save in a child that is killed before the `step`-th file takes its place."""
    pid = os.fork()
    if not pid:
        real, count = os.replace, iter(range(step))

        def replace(*args):
            if next(count, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args)

        replacing.move_up.__globals__["os"].replace = replace
        model.save_pretrained(folder, **options)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("options", [{}, {"max_shard_size": SHARD}], ids=["one file", "shards"])
@pytest.mark.parametrize("before", [{}, {"max_shard_size": SHARD}], ids=["over one file", "over shards"])
def test_the_new_model_is_there_and_nothing_of_the_old_one(before, options, models, tmp_path):
    old, new = models
    old.save_pretrained(tmp_path, **before)
    (tmp_path / "tokenizer.json").write_text("{}")
    new.save_pretrained(tmp_path, **options)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(new))
    new.save_pretrained(tmp_path.with_name("fresh"), **options)
    there, fresh = ({path.name for path in folder.iterdir()} for folder in (tmp_path, tmp_path.with_name("fresh")))
    assert there == fresh | {"tokenizer.json"}


@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_killed_in_between(step, models, tmp_path, caplog):
    old, new = models
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    old.save_pretrained(tmp_path, max_shard_size=SHARD)
    assert killed_at(step, new, tmp_path, max_shard_size=SHARD)
    with pytest.raises((OSError, ValueError), match=r"config\.json"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    new.save_pretrained(tmp_path)
    assert str(tmp_path / ".partial") in caplog.text
    assert not list(tmp_path.glob(".partial*"))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(new))
    torch.set_num_threads(threads)


def test_after_an_error_the_old_model_is_there(models, tmp_path, monkeypatch):
    old, new = models
    old.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(OSError, match="No space left"):
        new.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_saving_into_the_folder_that_it_was_loaded_from(models, tmp_path):
    """Its tensors are views of the file that is replaced."""
    models[0].save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    before = load_file(tmp_path / "model.safetensors")
    again.save_pretrained(tmp_path)
    after = load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(logits(again), logits(models[0]))


def test_an_error_leaves_no_half_of_a_model(models, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(OSError, match="No space left"):
        models[0].save_pretrained(tmp_path / "a" / "out")
    assert list((tmp_path / "a" / "out").iterdir()) == []
