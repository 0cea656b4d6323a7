"""Which mode loads a model, and that a mode neither holds the model nor goes with its copies."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.models import save_tiny_model, tiny_ids, tiny_model
from transformers_quip import QuipConfig, QuipQuantizer
from transformers_quip.hf import modes

RUN = QuipConfig(dataset=[[1, 2, 3, 4]] * 4, num_samples=4, sequence_length=4, refinement_sweeps=0)


@pytest.mark.parametrize(
    ("config", "kind", "pre_quantized"),
    [(QuipConfig(dataset=None), modes.WhileLoading, False), (RUN, modes.Calibrated, False)],
)
def test_a_dense_model(config, kind, pre_quantized):
    mode = modes.begin(tiny_model("llama"), config, False, [])
    assert type(mode) is kind
    assert mode.pre_quantized is pre_quantized
    assert mode.conversions(["rule"]) == ["rule"]  # no files, nothing to check


def test_a_quantized_folder_and_a_foreign_one(golden, tmp_path):
    folder = save_tiny_model("llama", tmp_path / "dense")
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=QuipConfig(dataset=None)).save_pretrained(tmp_path)
    native = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(native.hf_quantizer._mode) is modes.Prequantized
    foreign = AutoModelForCausalLM.from_pretrained(golden / "qs_E8P12_t128")
    assert type(foreign.hf_quantizer._mode) is modes.Repacked
    assert foreign.hf_quantizer.pre_quantized
    assert not hasattr(foreign.config, "quip_params")
    config = QuipConfig()
    config.quantized_modules = ["model.layers.{7-9}.fc"]
    with pytest.raises(ValueError, match="None of the quantized modules that config"):
        modes.begin(tiny_model("llama"), config, True, [])


@pytest.mark.parametrize("config", [QuipConfig(dataset=None), RUN], ids=["while loading", "calibrated"])
def test_only_the_weights_of_the_plan_are_quantized_as_they_are_read(config):
    model = tiny_model("llama")
    mode = modes.begin(model, config, False, [])
    bits = {name: mode.bits_of(name) for name, _ in model.named_parameters()}
    if config.is_calibrated:
        assert set(bits.values()) == {None}
        return
    assert all((number is not None) == (name.endswith("_proj.weight")) for name, number in bits.items())
    assert all(2 < number < 3 for number in bits.values() if number is not None)


def test_before_loading_there_is_no_mode():
    with pytest.raises(RuntimeError, match="called by from_pretrained"):
        QuipQuantizer(QuipConfig(), pre_quantized=False).get_quantize_ops()


@torch.no_grad()
def test_copies_of_a_model_have_nothing_to_load(tmp_path):
    folder = save_tiny_model("llama", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=copy.deepcopy(RUN))
    expected = model(tiny_ids()).logits
    assert model.hf_quantizer.report is not None
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same.hf_quantizer._mode is None
        assert len(same.hf_quantizer.report.modules) == len(model.hf_quantizer.report.modules)
        assert same.hf_quantizer.quantization_config == model.hf_quantizer.quantization_config
        assert torch.equal(same(tiny_ids()).logits, expected)
        weight = same.lm_head.weight
        assert not same.hf_quantizer.param_needs_quantization(same, "lm_head.weight")
        assert same.hf_quantizer.param_element_size(same, "lm_head.weight", weight) == weight.element_size()


def test_a_mode_does_not_hold_its_model():
    """A model holds its quantizer, and that its mode: a way back would keep the model's memory until the collector runs."""
    model = tiny_model("llama")
    mode = modes.begin(model, QuipConfig(dataset=None), False, [])
    gone = weakref.ref(model)
    del model
    gc.collect()  # cycles of Transformers' own
    assert gone() is None
    with pytest.raises(RuntimeError, match="is gone"):
        mode._model  # noqa: B018


def test_a_model_larger_than_memory_is_refused_before_it_is_loaded(tmp_path, monkeypatch):
    folder = save_tiny_model("llama", tmp_path / "dense")
    size = sum(parameter.nbytes for parameter in tiny_model("llama").parameters())
    monkeypatch.setattr(modes, "free_memory", lambda device: size - 1)
    monkeypatch.setattr(modes, "load_data", None)
    for device_map in (None, "cpu", {"": "cpu"}):
        with pytest.raises(ValueError, match=r"kB of memory are free. `transformers-quip quantize .*dense OUT`"):
            AutoModelForCausalLM.from_pretrained(folder, quantization_config=RUN, device_map=device_map)
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=QuipConfig(dataset=None, bits=4))
    monkeypatch.undo()
    monkeypatch.setattr(modes, "free_memory", lambda device: size)
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=RUN)
