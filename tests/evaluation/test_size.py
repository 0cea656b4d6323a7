"""Sizes against arithmetic on paper and files on disk."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.models import tiny_model
from transformers_quip.evaluation import linear_sizes, safetensors_bytes, true_bits_per_weight
from transformers_quip.nn import QuipLinear


@pytest.fixture
def model():
    """A dense and two quantized linears of the 2-bit codebook; 20 inputs complete a last block of 8."""
    return nn.ModuleDict(
        {
            "dense": nn.Linear(16, 16),
            "a": QuipLinear(16, 32, bias=True, dtype=torch.float32),
            "b": nn.Sequential(QuipLinear(20, 8, bias=False, dtype=torch.float16)),
        }
    )


def test_linear_sizes(model):
    a, b = linear_sizes(model)
    # codes: 2 bytes for 8 weights of a row; su and sv: 4 or 2 bytes a feature; a bias is not a weight
    assert (a.name, a.weights, a.bytes) == ("a", 16 * 32, 32 * 2 * 2 + (16 + 32) * 4)
    assert (b.name, b.weights, b.bytes) == ("b.0", 20 * 8, 8 * 3 * 2 + (20 + 8) * 2)
    assert a.bits == (128 + 192) * 8 / 512
    assert b.bits == (48 + 56) * 8 / 160


def test_true_bits_weigh_every_weight_the_same(model):
    assert true_bits_per_weight(model) == (320 + 104) * 8 / (512 + 160)


def test_a_dense_model_has_no_true_bits():
    with pytest.raises(ValueError, match="LlamaForCausalLM has no quantized linear"):
        true_bits_per_weight(tiny_model("llama"))


def test_safetensors_bytes(tmp_path):
    save_file({"x": torch.zeros(1000)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"y": torch.zeros(500)}, tmp_path / "model-00002-of-00002.safetensors")
    (tmp_path / "config.json").write_text("{}")
    total = sum(len(path.read_bytes()) for path in tmp_path.glob("*.safetensors"))
    assert safetensors_bytes(tmp_path) == total
    assert 6000 < total < 6500  # the tensors and two headers


def test_a_folder_without_weights(tmp_path):
    with pytest.raises(ValueError, match="no safetensors file"):
        safetensors_bytes(tmp_path)
