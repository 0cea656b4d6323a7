"""Two-sided rounding through the layer and the recipe: less of the model's loss is lost, by the formula in float64."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.models import tiny_model
from tests.problems import problem
from transformers_quip import QuipConfig
from transformers_quip.calibration.curvature import collect_curvature
from transformers_quip.nn.replace import quantized_linear
from transformers_quip.quantize.layer import quantize_weights
from transformers_quip.quantize.recipe import quantize_model

IDS = torch.randint(3, 128, (24, 20), generator=torch.Generator().manual_seed(5))


def output_hessian(rows, seed=1):
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(rows, 4 * rows, generator=generator) * torch.logspace(0, 1.5, rows)[:, None]
    return gradients @ gradients.T


def lost(weight, hessian, output, config, known):
    """tr(E H Eᵀ H_out) of the dequantized weight."""
    rows, columns = weight.shape
    found = quantize_weights({"fc": weight}, hessian, config, known)["fc"]
    linear = quantized_linear(torch.nn.Linear(columns, rows, bias=False), found, config)
    error = weight.double() - linear.dequantize(torch.float64)
    return torch.trace(error @ hessian.double() @ error.T @ output.double()).item()


@pytest.mark.parametrize("incoherence", ["hadamard", "kronecker", "none"])
@pytest.mark.parametrize(("rows", "columns"), [(64, 96), (44, 52)])
def test_a_layer(rows, columns, incoherence):
    weight, hessian = problem(rows, columns, seed=3)
    output = output_hessian(rows)
    config = {"refinement_sweeps": 2, "incoherence": incoherence}
    both = lost(weight, hessian, output, QuipConfig(rounding="yaqa", **config), {"fc": output * 7.0})
    one = lost(weight, hessian, output, QuipConfig(rounding="ldlq", **config), None)
    assert both < 0.97 * one


def test_without_an_output_hessian_it_is_ldlq():
    weight, hessian = problem(32, 64, seed=3)
    first, second = (
        quantize_weights({"fc": weight}, hessian, QuipConfig(rounding=method, refinement_sweeps=1))["fc"]
        for method in ("yaqa", "ldlq")
    )
    assert torch.equal(first.tensors["codes"], second.tensors["codes"])
    assert torch.equal(first.sv, second.sv)


@pytest.mark.parametrize("sketch", ["outputs", "A", "B"])
def test_a_model_loses_less(sketch):
    dense, ids = tiny_model("llama"), torch.randint(3, 128, (300, 20), generator=torch.Generator().manual_seed(5))
    other = torch.randint(3, 128, (32, 20), generator=torch.Generator().manual_seed(6))
    options = {
        "bits": 2,
        "dataset": ids,
        "sequence_length": 20,
        "num_samples": 300,
        "batch_size": 50,
        "refinement_sweeps": 0,
    }
    losses = {}
    for method in ("ldlq", "yaqa"):
        model = copy.deepcopy(dense)
        report = quantize_model(model, QuipConfig(rounding=method, sketch=sketch, sketch_samples=300, **options))
        assert report.config.rounding == method
        with torch.no_grad():
            p, q = (each(other).logits.double().log_softmax(-1) for each in (dense, model))
        losses[method] = (p.exp() * (p - q)).sum(-1).mean().item()
    assert losses["yaqa"] < 0.985 * losses["ldlq"]


def test_gradients_of_zero_name_the_module():
    weight, hessian = problem(32, 64, seed=3)
    with pytest.raises(ValueError, match="fc has an output-side Hessian without a positive diagonal"):
        quantize_weights({"fc": weight}, hessian, QuipConfig(rounding="yaqa"), {"fc": torch.zeros(32, 32)})


def test_only_the_modules_that_ask_for_it(monkeypatch):
    asked = []

    def noted(model, names, ids, *arguments, **options):
        asked.extend(names)
        assert ids.shape == (5, 20)
        return collect_curvature(model, names, ids, *arguments, **options)

    monkeypatch.setattr("transformers_quip.quantize.gradients.collect_curvature", noted)
    options = {"dataset": IDS, "sequence_length": 20, "num_samples": 24, "refinement_sweeps": 0, "sketch_samples": 5}
    quantize_model(tiny_model("llama"), QuipConfig(modules={"*.down_proj": {"rounding": "yaqa"}}, **options))
    assert asked == [f"model.layers.{layer}.mlp.down_proj" for layer in range(2)]
