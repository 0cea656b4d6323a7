"""sv that float16 cannot hold: the warning says which error results, and is right."""

import logging
import re

import pytest
import torch
from torch import nn

from transformers_quip import QuipConfig
from transformers_quip.nn.replace import replace_embedding, replace_linear
from transformers_quip.quantize.embedding import quantize_embedding
from transformers_quip.quantize.layer import quantize_weight, quantize_weights

SCALE = 1e-6


def weight():
    return torch.randn(48, 64, generator=torch.Generator().manual_seed(0)) * SCALE


def calibrated(matrix, config):
    return quantize_weights({"w": matrix}, torch.eye(64), config)["w"]


def alone(matrix, config):
    return quantize_weight(matrix, config, "w")


def stored_error(matrix, result, config, kind):
    """The relative error of the module that is put into a model."""
    if kind is quantize_embedding:
        model = nn.ModuleDict({"w": nn.Embedding.from_pretrained(matrix)})
        module = replace_embedding(model, "w", result, config)
    else:
        model = nn.ModuleDict({"w": nn.Linear(64, 48, bias=False, dtype=matrix.dtype)})
        module = replace_linear(model, "w", result, config)
    error = module.dequantize(torch.float64) - matrix.double()
    return (error.square().sum() / matrix.double().square().sum()).item()


@pytest.mark.parametrize("kind", [alone, calibrated, quantize_embedding])
def test_the_error_that_storage_adds_is_foretold(kind, caplog):
    matrix, config = weight().half(), QuipConfig(codebook="scalar8", dataset=None)
    arguments = (matrix, config, "w") if kind is quantize_embedding else (matrix, config)
    with caplog.at_level(logging.WARNING):
        result = kind(*arguments)
    pattern = r"w: its scales sv \((\S+) to .* leave the normal numbers of float16 .* from (\S+) to (\S+)\. Load"
    said = re.search(pattern, caplog.text)
    least, before, after = map(float, said.groups())
    assert least == pytest.approx(result.sv.abs().min().item(), rel=0.05)
    assert least < torch.finfo(torch.float16).tiny
    found = stored_error(matrix, result, config, kind)
    assert after == pytest.approx(found, rel=0.1)
    assert before == pytest.approx(result.statistics["relative_error"], rel=0.1)
    assert after > 10 * before


@pytest.mark.parametrize("kind", [alone, calibrated, quantize_embedding])
@pytest.mark.parametrize(
    ("dtype", "codebook", "scale"),
    [
        (torch.bfloat16, "scalar8", 1.0),
        (torch.float32, "scalar8", 1.0),
        (torch.float16, "scalar8", 1e4),  # weights of 0.01
        (torch.float16, "e8p", 60.0),  # sv of 6e-5 is subnormal, and loses nothing that shows at 2 bits
    ],
)
def test_what_loses_nothing_is_not_warned_of(kind, dtype, codebook, scale, caplog):
    matrix, config = (weight() * scale).to(dtype), QuipConfig(codebook=codebook, dataset=None)
    with caplog.at_level(logging.WARNING):
        kind(*((matrix, config, "w") if kind is quantize_embedding else (matrix, config)))
    assert "normal numbers" not in caplog.text


def test_scales_that_overflow(caplog):
    """On the points ±1/2 the weight 6e4 is sv / 2, and float16 ends at 65504."""
    matrix = torch.full((64, 64), 6e4).half()
    config = QuipConfig(codebook="scalar2", scale=0.25, dataset=None, incoherence="none")
    with caplog.at_level(logging.WARNING):
        result = quantize_weight(matrix, config, "w")
    assert result.sv.abs().max() > torch.finfo(torch.float16).max
    assert "leave the normal numbers of float16" in caplog.text
    assert "to inf. Load" in caplog.text


def test_weights_of_zero_are_not_warned_of(caplog):
    with caplog.at_level(logging.WARNING):
        quantize_weight(torch.zeros(16, 32, dtype=torch.float16), QuipConfig(bits=4, dataset=None), "w")
    assert not caplog.text
