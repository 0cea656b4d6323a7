"""A saved model of every codebook, written by `make.py` from the formats' description, is read as it was meant."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.formats.make import LAYER, dense_weight
from transformers_quip import codebooks
from transformers_quip.codebooks import trellis
from transformers_quip.nn.replace import quantized_modules

HERE = Path(__file__).resolve().parent
FOLDERS = sorted(path.parent.name for path in HERE.glob("*/config.json"))
IDS = torch.arange(12).reshape(2, 6)


def test_every_codebook_has_a_saved_model():
    saved = set()
    for name in FOLDERS:
        config = json.loads((HERE / name / "config.json").read_text())["quantization_config"]
        saved |= {config["codebook"], *(options["codebook"] for options in config.get("modules", {}).values())}
    assert {name for name in saved if not name.startswith("trellis:")} == set(codebooks.names())
    codes = {name.split(":")[1].split("-")[0] for name in saved if name.startswith("trellis:")}
    assert codes == {*trellis.COMPUTED, *trellis.TABULATED} - {"lut"}


@pytest.mark.parametrize("folder", FOLDERS)
@torch.no_grad()
def test_weights_and_outputs(folder, tmp_path):
    expected = load_file(HERE / folder / "expected.safetensors")
    model = AutoModelForCausalLM.from_pretrained(HERE / folder)
    modules = {name.removeprefix(LAYER): module for name, module in quantized_modules(model).items()}
    assert modules.keys() == expected.keys()
    for name, module in modules.items():
        error = (module.dequantize(torch.float64) - expected[name].double()).abs().max()
        assert error < 1e-6 * expected[name].abs().max(), name
    logits = model(IDS).logits
    dense = AutoModelForCausalLM.from_pretrained(HERE / folder).dequantize()
    for name, weight in expected.items():
        dense.get_submodule(name if name in ("model.embed_tokens", "lm_head") else LAYER + name).weight.copy_(weight)
    torch.testing.assert_close(logits, dense(IDS).logits, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    written, read = load_file(tmp_path / "model.safetensors"), load_file(HERE / folder / "model.safetensors")
    assert written.keys() == read.keys()
    assert all(torch.equal(written[name], read[name]) and written[name].dtype == read[name].dtype for name in read)


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_files_are_what_the_description_says(folder):
    """Against `truth`, not the package: the files themselves have not been changed."""
    config = json.loads((HERE / folder / "config.json").read_text())["quantization_config"]
    tensors, expected = load_file(HERE / folder / "model.safetensors"), load_file(HERE / folder / "expected.safetensors")
    for name, weight in expected.items():
        name = name if name in ("model.embed_tokens", "lm_head") else LAYER + name
        prefix = f"{name}."
        parts = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        torch.testing.assert_close(dense_weight(parts, name, config).float(), weight)
