"""Tiny models on disk, dense and quantized, made once for all integration tests."""

from __future__ import annotations

import functools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.models import save_tiny_model, tiny_ids
from transformers_quip import QuipConfig


@pytest.fixture(scope="session")
def dense(tmp_path_factory):
    """dense(arch, dtype=...) → folder of a tiny dense model."""

    @functools.cache
    def folder(arch: str, **arguments) -> str:
        return save_tiny_model(arch, tmp_path_factory.mktemp(arch), **arguments)

    return folder


@pytest.fixture(scope="session")
def quantized(dense, tmp_path_factory):
    """quantized(arch, dtype=...) → folder of the same model, quantized without calibration."""

    @functools.cache
    def folder(arch: str, **arguments) -> str:
        path = tmp_path_factory.mktemp(arch)
        config = QuipConfig(dataset=None)
        AutoModelForCausalLM.from_pretrained(dense(arch), quantization_config=config, **arguments).save_pretrained(path)
        return str(path)

    return folder


@pytest.fixture
def ids() -> torch.Tensor:
    return tiny_ids()


@pytest.fixture(scope="session")
def calibrated_config():
    """A calibrated run that takes a moment: 4 sequences of 16 given tokens, one sweep."""
    return QuipConfig(dataset=tiny_ids(4, 16, seed=5), num_samples=4, sequence_length=16, refinement_sweeps=1)


@pytest.fixture
def changed(tmp_path):
    """changed(folder, tensors=…, config=…) → a copy with other tensors and another quantization_config."""

    def copy(folder, tensors=None, config=None):
        target = tmp_path / "changed"
        shutil.copytree(folder, target, copy_function=shutil.copyfile)
        target.chmod(0o755)
        if tensors is not None:
            values = load_file(target / "model.safetensors")
            tensors(values)
            save_file(values, target / "model.safetensors", {"format": "pt"})
        if config is not None:
            values = json.loads((target / "config.json").read_text())
            config(values)
            (target / "config.json").write_text(json.dumps(values))
        return target

    return copy
