"""Tiny dense models on disk and the same quantized to 2 bits, made once for the tests of adapters."""

from __future__ import annotations

import functools

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.models import save_tiny_model
from transformers_quip import QuipConfig

IDS = torch.randint(3, 128, (24, 20), generator=torch.Generator().manual_seed(5))


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Float32 products while inputs are observed, so that figures are exact."""
    monkeypatch.setattr("transformers_quip.calibration.precision._multiplies_bfloat16", lambda: False)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """folders(arch) → (folder of a dense model, folder of it quantized)"""

    @functools.cache
    def make(arch: str) -> tuple[str, str]:
        dense, quantized = save_tiny_model(arch, tmp_path_factory.mktemp(arch)), tmp_path_factory.mktemp(arch)
        config = QuipConfig(dataset=IDS[:8], sequence_length=20, num_samples=8, batch_size=4, refinement_sweeps=1)
        AutoModelForCausalLM.from_pretrained(dense, quantization_config=config).save_pretrained(quantized)
        return str(dense), str(quantized)

    return make


@pytest.fixture
def load():
    return AutoModelForCausalLM.from_pretrained
