"""A tiny dense model, the same quantized, and its teacher's states; products in float32, so that figures are exact."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.models import tiny_model
from transformers_quip import QuipConfig
from transformers_quip.finetune import head, memory, product, student, teacher
from transformers_quip.quantize.recipe import quantize_model

IDS = torch.randint(3, 128, (24, 20), generator=torch.Generator().manual_seed(5))


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    for module in (memory, product, student, teacher):
        monkeypatch.setattr(module, "product_dtype", lambda device: torch.float32)
    monkeypatch.setattr("transformers_quip.finetune.end_to_end.product_dtype", lambda device: torch.float32)
    monkeypatch.setattr(head, "CHUNK", 7)  # several chunks, and an incomplete one


def pair(arch: str, **changes):
    """(dense model, the same quantized to 2 bits)"""
    dense = tiny_model(arch, **changes)
    model = copy.deepcopy(dense)
    config = QuipConfig(bits=2, dataset=IDS[:8], sequence_length=20, num_samples=8, batch_size=4, refinement_sweeps=1)
    quantize_model(model, config)
    return dense, model
