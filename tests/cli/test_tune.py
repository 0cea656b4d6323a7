"""tune: a few steps on a tiny model, and the options that it refuses."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.cli.test_cli import run
from tests.models import HIDDEN, LAYERS, save_tiny_model
from transformers_quip import QuipConfig, cli
from transformers_quip.calibration.dataset import load_token_ids
from transformers_quip.finetune import record


def test_tune(quantized, dense, text, tmp_path, capsys):
    """A few steps on a tiny model; a run that is repeated with its state goes on, and the codes are those of before."""
    out, state = tmp_path / "tuned", tmp_path / "state"
    options = ["--dense", dense, "--dataset", text, "--num-samples", 16, "--sequence-length", 16, "--held-out", 8]
    options += ["--epochs", 8, "--learning-rate", 0.02, "--state", state, "--dtype", "float32"]
    report = tmp_path / "report.html"
    code, found, err = run(capsys, "tune", quantized, out, *options, "--report", report, "--json")
    assert code == 0, err
    assert found["kept"] is True
    assert "KL divergence to the dense model while tuning" in report.read_text()
    assert len(found["history"]) == 8
    card = (out / "README.md").read_text()
    assert f"before tuning on 256 tokens | {found['held_out_before']:.4f} |" in card
    assert f"| the same after tuning (text held out from it) | {found['held_out_after']:.4f} |" in card
    assert "tuned afterwards" in card
    assert found["held_out_after"] < found["held_out_before"]
    assert "texts given by the caller" in err
    before, after = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (quantized, out))
    codes = [name for name in before if "codes" in name]
    assert codes
    assert all(torch.equal(before[name], after[name]) for name in codes)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert AutoTokenizer.from_pretrained(out)("abc")["input_ids"] == [97, 98, 99]
    assert {path.name for path in state.iterdir()} == {"teacher.bin", "teacher.json", "tuning.safetensors"}
    code, shown, err = run(capsys, "tune", quantized, tmp_path / "again", *options)
    assert code == 0, err
    assert "KL divergence to the dense model" in shown
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").state_dict()
    assert all(torch.equal(again[name], value) for name, value in after.items())


def test_embeddings_and_a_share_of_the_other_divergence(quantized, dense, text, tmp_path, capsys):
    out = tmp_path / "tuned"
    options = ["--dense", dense, "--dataset", text, "--num-samples", 16, "--sequence-length", 16, "--held-out", 8]
    options += ["--epochs", 8, "--learning-rate", 0.02, "--dtype", "float32", "--embeddings", "--reverse", 0.5]
    code, found, err = run(capsys, "tune", quantized, out, *options, "--json")
    assert code == 0, err
    assert found["held_out_after"] < found["held_out_before"]
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (quantized, out))
    assert not torch.equal(before.get_input_embeddings().weight, after.get_input_embeddings().weight)
    # half a loss is another loss: the vectors that it finds differ
    code, other, err = run(capsys, "tune", quantized, tmp_path / "other", *options[:-1], 0, "--json")
    assert code == 0, err
    assert other["held_out_after"] != found["held_out_after"]


def test_text_that_the_quantized_model_writes(quantized, dense, text, tmp_path, capsys, monkeypatch):
    seen = []

    def recorded(model, ids, *arguments, **named):
        seen.append(ids)
        return record(model, ids, *arguments, **named)

    monkeypatch.setattr("transformers_quip.finetune.record", recorded)
    options = ["--dense", dense, "--dataset", text, "--num-samples", 12, "--sequence-length", 16, "--held-out", 8]
    options += ["--epochs", 1, "--dtype", "float32"]
    code, found, err = run(capsys, "tune", quantized, tmp_path / "tuned", *options, "--own-windows", 5, "--json")
    assert code == 0, err
    assert "5 x 16 that the quantized model wrote" in err
    assert found["tokens"] == (12 + 5) * 16
    code, _, err = run(capsys, "tune", quantized, tmp_path / "other", *options, "--json")
    assert code == 0, err
    with_own, without = seen
    assert torch.equal(with_own[5:], without)
    model = AutoModelForCausalLM.from_pretrained(quantized)
    own, _ = load_token_ids(QuipConfig(num_samples=5, sequence_length=16), model, AutoTokenizer.from_pretrained(quantized))
    assert torch.equal(with_own[:5], own)


def test_rounds_of_codes(quantized, dense, text, tmp_path, capsys):
    options = ["--dense", dense, "--dataset", text, "--num-samples", 12, "--sequence-length", 16, "--held-out", 8]
    options += ["--epochs", 1, "--dtype", "float32", "--code-rounds", 2, "--state", tmp_path / "state"]
    code, found, err = run(capsys, "tune", quantized, tmp_path / "tuned", *options, "--json")
    assert code == 0, err
    assert found["codes"]["after"] <= found["codes"]["before"]
    assert {path.name for path in (tmp_path / "state").iterdir()} >= {"tuning.safetensors", "codes.safetensors"}
    code, shown, err = run(capsys, "tune", quantized, tmp_path / "again", *options)
    assert code == 0, err
    assert f"{found['codes']['moved']} of {found['codes']['blocks']} blocks moved" in shown
    first, again = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("tuned", "again"))
    assert all(torch.equal(again[name], value) for name, value in first.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "none"], "tuning needs text"),
        (["--epochs", "0"], "epochs=0.0 must be a number above 0"),
        (["--num-samples", "2"], "windows to train on"),
    ],
)
def test_tune_refuses(quantized, dense, text, tmp_path, capsys, arguments, message):
    given = ["--dense", dense, "--dataset", text, "--sequence-length", "16", *arguments]
    code, _, err = run(capsys, "tune", quantized, tmp_path / "out", *given)
    assert code in (cli.USAGE, cli.UNUSABLE)
    assert message in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("part", ["num_hidden_layers", "hidden_size"])
def test_tune_refuses_a_model_of_another_size(quantized, text, tmp_path, capsys, part):
    """It would train towards another model; the config tells before a model is loaded."""
    other = tmp_path / "other"
    value = {"num_hidden_layers": LAYERS + 1, "hidden_size": 2 * HIDDEN}[part]
    save_tiny_model("llama", other, **{part: value})
    out = tmp_path / "out"
    code, _, err = run(capsys, "tune", quantized, out, "--dense", other, "--dataset", text)
    assert code == cli.UNUSABLE
    assert f"{other} is not the model that {quantized} was made from: its {part} is {value}" in err
    assert not out.exists()


def test_a_dense_model_is_quantized_before_it_is_tuned(dense, text, tmp_path, capsys):
    code, _, err = run(capsys, "tune", dense, tmp_path / "out", "--dense", dense, "--dataset", text)
    assert code == cli.UNUSABLE
    assert f"{dense} is a dense model: quantize it first" in err
    assert list(tmp_path.iterdir()) == []


def test_a_quantized_model_is_not_the_dense_one(quantized, text, tmp_path, capsys):
    for command, *options in (("tune", "--dense", quantized), ("quantize",)):
        code, _, err = run(capsys, command, quantized, tmp_path / "out", *options, "--dataset", text)
        assert code == cli.UNUSABLE
        assert f"{quantized} is quantized already (quip): give the dense model" in err
    assert list(tmp_path.iterdir()) == []
