"""A model with a tower for images: what calibration on text reaches, and what is rounded without it."""

import logging

import pytest
import torch
from transformers import AutoModelForImageTextToText

from tests.architectures.check import inputs_for
from tests.architectures.tiny import randomize, tiny_config
from tests.models import tiny_ids
from transformers_quip import QuipConfig
from transformers_quip.nn.replace import quantized_names

DATA = {"dataset": tiny_ids(4, 16, seed=5), "num_samples": 4, "sequence_length": 16, "refinement_sweeps": 1}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(tiny_config("llava")).eval()
    randomize(model)
    folder = tmp_path_factory.mktemp("llava")
    model.save_pretrained(folder)
    return str(folder)


def load(folder, **options):
    config = QuipConfig(bits=2, **DATA, **options)
    return AutoModelForImageTextToText.from_pretrained(folder, quantization_config=config)


def test_a_warning_names_the_option(dense, caplog):
    with caplog.at_level(logging.WARNING):
        names = quantized_names(load(dense))
    assert names
    assert all("language_model" in name for name in names)
    lines = [record.getMessage() for record in caplog.records if "stay dense" in record.getMessage()]
    assert len(lines) == 1
    assert "vision_tower" in lines[0]
    assert "outside_blocks='uncalibrated', with 8 bits for them" in lines[0]


@torch.no_grad()
def test_the_tower_is_quantized_without_calibration_on_request(dense, tmp_path):
    model = load(dense, outside_blocks="uncalibrated", modules={"*.vision_tower.*": {"bits": 4}})
    names = quantized_names(model)
    tower = [name for name in names if "vision_tower" in name]
    assert len(tower) >= 12
    assert any("multi_modal_projector" in name for name in names)
    assert not any("lm_head" in name for name in names)
    assert {model.get_submodule(name).codebook for name in tower} == {"e8p-rvq4"}
    text = [name for name in names if "language_model" in name]
    original = AutoModelForImageTextToText.from_pretrained(dense)
    for name in tower:
        weight = original.get_submodule(name).weight
        assert (model.get_submodule(name).dequantize() - weight).norm() < 0.15 * weight.norm()
    alone = load(dense)
    assert all(torch.equal(alone.get_submodule(name).codes, model.get_submodule(name).codes) for name in text)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    inputs = inputs_for(model)
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
