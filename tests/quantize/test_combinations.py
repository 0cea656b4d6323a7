"""Every rounding method with every codebook and every pair of transforms: it works, or the config says why not."""

import re

import pytest
import torch

from tests.models import tiny_model
from tests.problems import problem
from transformers_quip import QuipConfig, codebooks, incoherence, rounding
from transformers_quip.nn.replace import quantized_linear
from transformers_quip.quantize.layer import quantize_weight, quantize_weights
from transformers_quip.quantize.plan import make_plan

# 20 columns are not whole blocks of 8, and 12 rows are not a power of two.
ROWS, COLUMNS = 12, 20
TRANSFORMS = ["hadamard", "kronecker", "none", "hadamard-quip-for-all", ("hadamard", "none"), ("none", "kronecker")]
# Transforms in blocks, for sizes that are multiples of these numbers.
BLOCKED = {"hadamard-128": 128, "hadamard-256": 256, "hadamard-32": 32, "hadamard-eighths": 8}
SCALAR = {"half-integer", "scalar2", "scalar3", "scalar4", "scalar8"}
# What is defined for grids of single weights alone (QuIP, arXiv 2307.13304: algorithm 5, and stochastic rounding).
SCALAR_ONLY = {"stochastic", "convex"}


def test_nothing_is_left_out():
    known = {"ldlq", "ldlq-rg", "greedy", "quantease", "convex", "nearest", "stochastic", "yaqa"}
    assert set(rounding.names()) == known
    assert set(codebooks.names()) == {"e8p", "e8p-rvq3", "e8p-rvq4", "d4", *SCALAR}
    assert set(incoherence.names()) == {name for name in TRANSFORMS if isinstance(name, str)} | {"hadamard-eighths"}


@pytest.mark.parametrize("codebook", codebooks.names())
@pytest.mark.parametrize("method", rounding.names())
def test_works_or_is_refused(method, codebook):
    if method in SCALAR_ONLY and codebook not in SCALAR:
        said = f"rounding={method!r} does not work with codebook={codebook!r}, only with 'half-integer', 'scalar2'"
        with pytest.raises(ValueError, match=re.escape(said)):
            QuipConfig(codebook=codebook, rounding=method)
        with pytest.raises(ValueError, match=re.escape(said)):
            QuipConfig(rounding="nearest", modules={"fc": {"codebook": codebook, "rounding": method}})
        return
    weight, hessian = problem(ROWS, COLUMNS, seed=3)
    linear = torch.nn.Linear(COLUMNS, ROWS, bias=False)
    total = ((weight.double() @ hessian.double()) * weight).sum()
    for transform, rescale in [*((name, True) for name in TRANSFORMS), ("hadamard", False)]:
        config = QuipConfig(codebook=codebook, rounding=method, incoherence=transform, rescale=rescale, refinement_sweeps=1)
        result = quantize_weights({"fc": weight}, hessian, config)["fc"]
        error = weight - quantized_linear(linear, result, config).dequantize(torch.float64)
        lost = (((error @ hessian.double()) * error).sum() / total).item()
        assert result.statistics["relative_error"] == pytest.approx(lost, rel=1e-3, abs=1e-6)
        # By lot, an error has twice the variance, and more at the ends of the grid.
        assert lost < {2: 0.25, 3: 0.1, 4: 0.025, 8: 2e-3}[config.bits] * (4 if method in SCALAR_ONLY else 1)
        if method in ("nearest", "stochastic"):
            blind = quantize_weight(weight, config, "fc")
            assert {k: v.shape for k, v in blind.tensors.items()} == {k: v.shape for k, v in result.tensors.items()}


@pytest.mark.parametrize("book", ["trellis:mul1:k2:exl3", "trellis:hyb-q9v2:k2:qtip", "trellis:mul1:k2.5:exl3"])
def test_trellis_codes_work_with_every_method_of_other_codebooks(book):
    rows, columns = 48, 96
    weight, hessian = problem(rows, columns, seed=3)
    linear = torch.nn.Linear(columns, rows, bias=False)
    total = ((weight.double() @ hessian.double()) * weight).sum()
    losses = {}
    for method in [name for name in rounding.names() if name not in SCALAR_ONLY]:
        config = QuipConfig(codebook=book, rounding=method, refinement_sweeps=2)
        result = quantize_weights({"fc": weight}, hessian, config)["fc"]
        error = weight - quantized_linear(linear, result, config).dequantize(torch.float64)
        losses[method] = (((error @ hessian.double()) * error).sum() / total).item()
        assert result.statistics["relative_error"] == pytest.approx(losses[method], rel=1e-3, abs=1e-6)
    assert losses.pop("nearest") < 0.12
    assert max(losses.values()) < 0.06  # feedback works
    for method in SCALAR_ONLY:
        with pytest.raises(ValueError, match=f"rounding='{method}' does not work with codebook='{book}'"):
            QuipConfig(codebook=book, rounding=method)


def test_sizes_that_a_trellis_cannot_have_are_refused_with_the_plan():
    model = torch.nn.ModuleDict({"fc": torch.nn.Linear(96, 40)})
    with pytest.raises(ValueError, match=r"fc has shape \[40, 96\].*multiples of 16 and 16.*leave the module dense"):
        make_plan(model, QuipConfig(codebook="trellis", dataset=None))
    model = torch.nn.ModuleDict({"fc": torch.nn.Linear(48, 32)})
    assert make_plan(model, QuipConfig(codebook="trellis", dataset=None)).names == ("fc",)
    with pytest.raises(ValueError, match=r"fc has shape \[32, 48\].*multiples of 16 and 32"):
        make_plan(model, QuipConfig(codebook="trellis", bits=2.5, dataset=None))


@pytest.mark.parametrize("name", BLOCKED)
def test_transforms_in_blocks_work_where_sizes_allow_it(name):
    weight, hessian = problem(256, 256, seed=4)
    config = QuipConfig(incoherence=name, refinement_sweeps=0)
    assert quantize_weights({"fc": weight}, hessian, config)["fc"].statistics["relative_error"] < 0.1
    model = torch.nn.ModuleDict({"fc": torch.nn.Linear(BLOCKED[name] + 4, 128)})
    with pytest.raises(ValueError, match=rf"fc has shape .*{name} works on .* not a multiple of"):
        make_plan(model, QuipConfig(incoherence=name, dataset=None))


def test_a_stored_transform_is_only_read():
    with pytest.raises(ValueError, match="stored"):
        make_plan(tiny_model("llama"), QuipConfig(incoherence="stored"))
