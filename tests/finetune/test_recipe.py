"""The option `tune` of a config: from_pretrained quantizes and tunes, and says what came of it."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.finetune.conftest import IDS
from tests.models import save_tiny_model
from transformers_quip import QuipConfig
from transformers_quip.evaluation import write_report

TUNE = {"epochs": 8, "batch_size": 4, "held_out": 8, "learning_rate": 2e-2}
OPTIONS = {"dataset": IDS, "num_samples": 16, "sequence_length": 20, "batch_size": 4, "refinement_sweeps": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model("llama", tmp_path_factory.mktemp("tiny"))


def load(folder, **changes):
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=QuipConfig(**{**OPTIONS, **changes}))


def test_it_tunes_what_it_quantized(folder, tmp_path):
    plain, tuned = load(folder), load(folder, tune=TUNE)
    codes = {name: value for name, value in plain.state_dict().items() if "codes" in name}
    # the held-out windows change neither the Hessians nor the codes
    assert all(torch.equal(tuned.state_dict()[name], value) for name, value in codes.items())
    record = tuned.config.quantization_config.calibration["tuning"]
    assert record["kept"] is True
    assert record["held_out_after"] < record["held_out_before"]
    report = tuned.hf_quantizer.report
    assert report.seconds["tune"] > 0
    assert report.tokens == 16 * 20
    assert [look["step"] for look in report.tuning["history"]][-1] == 8 * 16 // 4
    dense = AutoModelForCausalLM.from_pretrained(folder)
    other = torch.randint(3, 128, (8, 20), generator=torch.Generator().manual_seed(77))
    with torch.no_grad():
        p = dense(other).logits.double().log_softmax(-1)
        loss = [(p.exp() * (p - m(other).logits.double().log_softmax(-1))).sum(-1).mean() for m in (plain, tuned)]
    assert loss[1] < 0.95 * loss[0]
    tuned.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert f"| {record['held_out_after']:.4f} |" in card
    assert "tuned afterwards" not in card  # the call that makes it has the option
    page = write_report(tmp_path / "report.html", tuned).read_text()
    assert "KL divergence to the dense model while tuning" in page
    assert "<h2>Layers</h2>" in page
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.quantization_config.tune == {**record_of(TUNE)}
    assert all(torch.equal(again.state_dict()[name], value) for name, value in tuned.state_dict().items())


def record_of(options):
    return QuipConfig(tune=options).tune


def test_text_that_the_model_writes(folder):
    options = {"dataset": "self", "num_samples": 12, "sequence_length": 16}
    model = load(folder, tune={**TUNE, "epochs": 1}, **options)
    assert "written by the model itself" in model.hf_quantizer.report.data
    assert model.config.quantization_config.calibration["tuning"]["steps"] == 3


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_gradients_are_switched_off_around_it(folder, context):
    with context():
        model = load(folder, tune=TUNE)
    assert model.config.quantization_config.calibration["tuning"]["kept"] is True
    assert not any(parameter.is_inference() for name, parameter in model.named_parameters() if ".su" in name)


def test_too_little_text_is_found_out_before_the_work(folder, monkeypatch):
    monkeypatch.setattr("transformers_quip.hf.modes.quantize_and_tune", lambda *a, **k: pytest.fail("it began"))
    with pytest.raises(ValueError, match="at least 4 windows to train on and 8 held out, got 10"):
        load(folder, dataset=IDS[:10], tune=TUNE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tune": "all"}, "tune='all' cannot be used: tune='all' is not known"),
        ({"tune": {"epoch": 2}}, "tune has no option 'epoch'"),
        ({"tune": {"reverse": 1.5}}, "reverse=1.5 must be a number from 0 to 1"),
        ({"tune": "vectors", "dataset": None}, "tune='vectors' needs text, and dataset=None gives none"),
    ],
)
def test_bad_options(changes, message):
    with pytest.raises(ValueError, match=message):
        QuipConfig(**changes)


def test_blocks_alone_hold_no_text_out_and_full_does_both(folder):
    blocks = load(folder, tune={"mode": "blocks", "block_windows": 8}, num_samples=24)
    report = blocks.hf_quantizer.report
    assert report.tokens == 24 * 20
    assert report.seconds["tune"] > 0
    assert report.tuning is None
    plain = load(folder, num_samples=24)
    name = "model.layers.0.input_layernorm.weight"
    assert not torch.equal(blocks.get_parameter(name), plain.get_parameter(name))
    full = load(folder, tune={**TUNE, "mode": "full", "block_windows": 8})
    assert full.config.quantization_config.calibration["tuning"]["kept"] is True
    assert full.hf_quantizer.report.tokens == 16 * 20
    record = full.hf_quantizer.report.tuning
    assert record["held_out_after"] < record["held_out_before"]


def test_blocks_need_no_windows_beside_their_own(folder):
    """The windows that `held_out` names are those of tuning vectors; 8 windows are fewer than it."""
    ids = torch.randint(3, 128, (8, 20), generator=torch.Generator().manual_seed(5))
    model = load(folder, tune="blocks", dataset=ids, num_samples=8)
    assert model.hf_quantizer.report.tokens == 8 * 20
