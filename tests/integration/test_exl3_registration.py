"""Two packages that register "exl3": the first keeps the name, and QuipConfig() chooses this one in any order."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from tests.models import tiny_ids
from transformers_quip import QuipConfig
from transformers_quip.hf.methods import register

NAME = "exl3_mcg_k4"


class Exl3Config(QuantizationConfigMixin):
    """What the other package has."""

    def __init__(self, **values):
        self.quant_method = "exl3"


class Exl3Quantizer(HfQuantizer):
    def validate_environment(self, **kwargs):
        raise RuntimeError("EXL3 models need a CUDA device")

    def is_serializable(self):
        return False

    @property
    def is_trainable(self):
        return False


@pytest.fixture
def theirs(monkeypatch):
    monkeypatch.setitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "exl3", Exl3Config)
    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, "exl3", Exl3Quantizer)


def test_the_first_keeps_the_name_and_the_warning_says_how_to_choose(theirs, caplog, monkeypatch, golden):
    logger = logging.getLogger("transformers_quip")
    monkeypatch.setattr(logger, "propagate", True)
    with caplog.at_level(logging.WARNING, logger="transformers_quip"):
        register()
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["exl3"] is Exl3Config
    assert AUTO_QUANTIZER_MAPPING["exl3"] is Exl3Quantizer
    assert "quantization_config=QuipConfig()) loads them by transformers-quip" in caplog.text
    with pytest.raises(RuntimeError, match="need a CUDA device"):
        AutoModelForCausalLM.from_pretrained(golden / NAME)


@pytest.mark.parametrize("asked", [QuipConfig(), {"quant_method": "quip"}], ids=["config", "dict"])
@torch.no_grad()
def test_a_config_of_ours_chooses_this_package(asked, theirs, golden, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(golden / NAME, dtype=torch.float32, quantization_config=asked)
    from safetensors.torch import load_file

    expected = load_file(golden / NAME / "expected.safetensors")
    logits = model(expected["input_ids"]).logits
    assert ((logits - expected["logits"]).norm() / expected["logits"].norm()).item() < 1e-3
    assert model.config.quantization_config.quantized_modules
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)  # native now: nobody else's
    assert torch.equal(again(tiny_ids()).logits, model(tiny_ids()).logits)


def test_a_config_of_others_does_not(theirs, golden):
    with pytest.raises(ValueError, match="quantized with Exl3Config but you are passing a BitsAndBytesConfig"):
        AutoModelForCausalLM.from_pretrained(golden / NAME, quantization_config=BitsAndBytesConfig(load_in_8bit=True))


@torch.no_grad()
def test_ours_first_stays_ours(golden):
    """The other package takes the name where it is free only."""
    register()
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["exl3"].__module__.startswith("transformers_quip.")
    for arguments in ({}, {"quantization_config": QuipConfig()}):
        model = AutoModelForCausalLM.from_pretrained(golden / NAME, **arguments)
        assert model.config.quantization_config.quantized_modules
