"""`incoherence.register`: the worked example of its docstring through a whole model, and what is refused."""

import inspect
import textwrap

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.models import save_tiny_model, tiny_ids
from transformers_quip import QuipConfig, incoherence
from transformers_quip.incoherence import Transform
from transformers_quip.quantize.layer import quantize_weight


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    monkeypatch.setattr(incoherence._TRANSFORMS, "_entries", dict(incoherence._TRANSFORMS._entries))


def example():
    text = inspect.getdoc(incoherence.register)
    code = textwrap.dedent(text.partition("Example:")[2].partition("\n")[2])
    exec(code, {"incoherence": incoherence, "QuipConfig": QuipConfig, "torch": torch})


def test_the_worked_example_is_orthogonal_and_seeded():
    example()
    matrix = incoherence.get("dense", 24, 3).matrix()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(24, dtype=torch.float64))
    generator = torch.Generator().manual_seed(3)
    gaussian = torch.randn(24, 24, generator=generator, dtype=torch.float64)
    upper = matrix.T @ gaussian  # the R of Q R, with a positive diagonal: there is only one such Q
    assert upper.tril(-1).abs().max() < 1e-12
    assert (upper.diagonal() > 0).all()
    assert incoherence.get("dense", 24, 3) is incoherence.get("dense", 24, 3)


def test_a_weight_after_it_is_what_its_equation_says():
    example()
    weight = torch.randn(40, 24, generator=torch.Generator().manual_seed(1))
    result = quantize_weight(weight, QuipConfig(codebook="scalar8", incoherence="dense", dataset=None), "w")
    q_out, q_in = incoherence.get("dense", 40).matrix(), incoherence.get("dense", 24).matrix()
    decoded = result.tensors["codes"].double() - 127.5
    dense = result.sv.double()[:, None] * (q_out @ decoded @ q_in.T) * result.su.double()
    assert (dense - weight).square().mean().sqrt() < 0.02


def test_a_model_is_quantized_with_it_saved_and_run(tmp_path):
    example()
    source, folder = save_tiny_model("llama", tmp_path / "dense"), tmp_path / "quantized"
    config = QuipConfig(bits=4, incoherence="dense", dataset=tiny_ids(6, 16), num_samples=6, sequence_length=16)
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    model.save_pretrained(folder)
    restored = AutoModelForCausalLM.from_pretrained(folder)
    dense = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        found, again, wanted = (one(tiny_ids()).logits for one in (model, restored, dense))
    assert torch.equal(found, again)
    assert (found - wanted).square().mean() < 0.05 * wanted.square().mean()


def test_what_cannot_be_registered():
    with pytest.raises(ValueError, match="incoherence 'hadamard' is registered already"):
        incoherence.register("hadamard", lambda size, seed: None)
    with pytest.raises(ValueError, match="matrices that a checkpoint stores"):
        incoherence.register("stored", lambda size, seed: None)
    incoherence.register("half", lambda size, seed: Transform([torch.eye(size // 2, dtype=torch.float64)]))
    with pytest.raises(ValueError, match="'half' must give a Transform of 8 numbers, and gave one of 4"):
        incoherence.get("half", 8)
    incoherence.register("none at all", lambda size, seed: None)
    with pytest.raises(ValueError, match="gave None"):
        incoherence.get("none at all", 8)
