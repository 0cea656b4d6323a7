"""`rounding.register`: the worked example of its docstring through a whole model, and what is refused."""

import inspect
import textwrap

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.models import save_tiny_model, tiny_ids
from tests.problems import problem
from transformers_quip import QuipConfig, codebooks, rounding
from transformers_quip.quantize.layer import quantize_weight, quantize_weights
from transformers_quip.rounding import Problem, proxy_loss


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    monkeypatch.setattr(rounding._ROUNDINGS, "_entries", dict(rounding._ROUNDINGS._entries))


def example():
    text = inspect.getdoc(rounding.register)
    code = textwrap.dedent(text.partition("Example:")[2].partition("\n")[2])
    exec(code, {"rounding": rounding, "QuipConfig": QuipConfig})


def test_the_worked_example_takes_the_better_one():
    example()
    book = codebooks.get("scalar2")
    weight, hessian = problem(24, 40, seed=6)
    losses = {
        name: proxy_loss(weight - rounding.get(name).round(Problem(weight, hessian, book, 2)).points, hessian).item()
        for name in ("ldlq", "greedy", "better-of-two")
    }
    assert losses["ldlq"] != losses["greedy"]
    assert losses["better-of-two"] == min(losses["ldlq"], losses["greedy"])


def test_a_model_is_quantized_with_it_saved_and_run(tmp_path):
    example()
    dense, folder = save_tiny_model("llama", tmp_path / "dense"), tmp_path / "quantized"
    config = QuipConfig(bits=2, rounding="better-of-two", dataset=tiny_ids(6, 16), num_samples=6, sequence_length=16)
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
    model.save_pretrained(folder)
    restored = AutoModelForCausalLM.from_pretrained(folder)
    assert restored.config.quantization_config.rounding == "better-of-two"
    with torch.no_grad():
        assert torch.equal(restored(tiny_ids()).logits, model(tiny_ids()).logits)


class Whole(rounding.Rounding):
    """Remembers how many rows it was given at a time."""

    name, needs_hessian, rows_independent = "whole", False, False

    def __init__(self):
        self.rows = []

    def round(self, problem):
        self.rows.append(len(problem.weight))
        return rounding.get("nearest").round(problem)


def test_a_method_that_looks_at_all_rows_gets_each_weight_whole(monkeypatch):
    method = Whole()
    rounding.register("whole", method)
    monkeypatch.setattr("transformers_quip.quantize.layer.CHUNK", 64)
    config = QuipConfig(bits=2, rounding="whole", dataset=None)
    weight, hessian = problem(40, 24)
    quantize_weight(weight, config, "a")
    assert method.rows == [40]
    method.rows.clear()
    config.update(scale=1.0)
    results = quantize_weights({"a": weight[:24], "b": weight[24:]}, hessian, config)
    assert method.rows == [24, 16]
    config.update(rounding="nearest")
    stacked = quantize_weights({"a": weight[:24], "b": weight[24:]}, hessian, config)
    for name in "ab":
        assert torch.equal(results[name].tensors["codes"], stacked[name].tensors["codes"])


def test_what_cannot_be_registered():
    with pytest.raises(ValueError, match="rounding 'ldlq' is registered already"):
        rounding.register("ldlq", rounding.get("ldlq"))
    with pytest.raises(ValueError, match="registered as 'other' is called 'whole'"):
        rounding.register("other", Whole())
    with pytest.raises(TypeError, match="an instance of a rounding.Rounding subclass"):
        rounding.register("whole", Whole)
    with pytest.raises(ValueError, match="'whole'"):
        QuipConfig(rounding="whole")
