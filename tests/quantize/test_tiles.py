"""Codebooks of tiles through the recipe: stacks, chunks, samples of rows, embeddings and whole models."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.models import save_tiny_model, tiny_ids, tiny_model
from tests.problems import problem
from tests.tiles import TILE, nearest, register
from transformers_quip import QuipConfig, incoherence
from transformers_quip.quantize import layer
from transformers_quip.quantize.embedding import quantize_embedding
from transformers_quip.quantize.layer import quantize_weight, quantize_weights
from transformers_quip.quantize.plan import make_plan


@pytest.fixture(autouse=True)
def book(monkeypatch):
    return register(monkeypatch)


def config(**options):
    return QuipConfig(codebook="test-tiles", **{"dataset": None, **options})


def equation(result, book, rows, columns):
    """diag(sv) Q_out Ŵ Q_inᵀ diag(su) in float64."""
    decoded = book.decode(result.tensors, columns).double()
    q_out, q_in = incoherence.get("hadamard", rows).matrix(), incoherence.get("hadamard", columns).matrix()
    return result.sv.double()[:, None] * (q_out @ decoded @ q_in.T) * result.su.double()


def test_stacked_weights_are_rounded_as_each_by_itself(book):
    """Sizes 32 and 48 in one stack, of 40 columns: the last tile of each row is completed."""
    weight, hessian = problem(80, 40, seed=1)
    options = config(rescale=False, scale=1.0)
    together = quantize_weights({"a": weight[:32], "b": weight[32:]}, hessian, options)
    for name, part in (("a", weight[:32]), ("b", weight[32:])):
        alone = quantize_weights({name: part}, hessian, options)[name]
        assert torch.equal(together[name].tensors["codes"], alone.tensors["codes"])
        assert together[name].tensors["codes"].shape == (len(part) // TILE, 3 * 33)
        error = part.double() - equation(together[name], book, *part.shape)
        lost = ((error @ hessian.double()) * error).sum() / ((part.double() @ hessian.double()) * part).sum()
        assert together[name].statistics["relative_error"] == pytest.approx(lost.item(), rel=1e-4)
        assert lost < 0.4


def test_chunks_are_whole_rows_of_tiles(book, monkeypatch):
    weight, _ = problem(112, 64, seed=2)
    whole = quantize_weight(weight, config(), "w")
    monkeypatch.setattr(layer, "CHUNK", 40 * 64)  # 40 rows at a time would cut tiles
    assert layer.chunks_of_rows(112, 64, book, layer.method_without_hessian(config())) == [
        (0, 32),
        (32, 64),
        (64, 96),
        (96, 112),
    ]
    chunked = quantize_weight(weight, config(), "w")
    assert torch.equal(whole.tensors["codes"], chunked.tensors["codes"])
    # Against the brute force on the rotated weight.
    signs_in, signs_out = incoherence.signs(64, 0, "in").double(), incoherence.signs(112, 0, "out").double()
    q_out, q_in = incoherence.get("hadamard", 112).matrix(), incoherence.get("hadamard", 64).matrix()
    rotated = q_out.T @ (signs_out[:, None] * (weight.double() * signs_in) @ q_in)
    unit = rotated.square().mean().sqrt() / book.gaussian_scale
    torch.testing.assert_close(book.decode(whole.tensors, 64).double(), nearest(rotated / unit), rtol=1e-6, atol=1e-6)


def test_scales_are_tried_on_whole_tiles(book):
    """Of 320 rows, 8 of 20 rows of tiles: rows of those tiles only, in their places."""
    weight, _ = problem(320, 32, seed=3)
    part = layer._Part("w", weight, torch.float32, incoherence.get("hadamard", 320), weight, weight.square().mean().sqrt())
    sample = layer._sample(part, book)
    tiles = [int(index * 20 / 8) for index in range(8)]
    assert torch.equal(sample, torch.cat([weight[TILE * t : TILE * (t + 1)] for t in tiles]))
    chosen = quantize_weights({"w": weight}, problem(1, 32)[1], config())["w"].statistics["scale"]
    assert chosen in book.scale_factors


def test_embeddings_try_scales_for_each_row_of_tiles(book):
    """By brute force, with 40 rows: what completes the last row of tiles is not stored in the error."""
    generator = torch.Generator().manual_seed(4)
    table = torch.randn(48, 32, generator=generator) * torch.linspace(-3, 3, 48).exp()[:, None]
    result = quantize_embedding(table, config(), "table")
    rotated = (table.double() * result.su.double()) @ incoherence.get("hadamard", 32).matrix()
    unit = rotated.square().mean(1, keepdim=True).sqrt() / book.gaussian_scale
    trials = []
    for factor in book.scale_factors:
        points = nearest(rotated * factor / unit)
        fitted = (points * rotated).sum(1) / points.square().sum(1)
        trials.append((rotated - points * fitted[:, None]).square().sum(1).reshape(3, TILE).sum(1))
    wanted = torch.stack(trials).amin(0)
    decoded = book.decode(result.tensors, 32).double() * result.sv.double()[:, None]
    found = (rotated - decoded).square().sum(1).reshape(3, TILE).sum(1)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=0)
    assert result.statistics["relative_error"] == pytest.approx((wanted.sum() / rotated.square().sum()).item(), rel=1e-4)


def test_what_is_incomplete_is_an_error_before_any_work():
    with pytest.raises(ValueError, match=r"gate_proj has shape \[72, 64\]: codebook 'test-tiles' needs a multiple of 16"):
        make_plan(tiny_model("llama", intermediate_size=72), config())
    with pytest.raises(ValueError, match=r"w has shape \[24, 32\]: codebook 'test-tiles' needs a multiple of 16"):
        quantize_weight(torch.ones(24, 32), config(), "w")
    with pytest.raises(ValueError, match=r"w has shape \[24, 32\]: codebook"):
        quantize_weights({"w": torch.ones(24, 32)}, torch.eye(32), config())


@pytest.mark.parametrize("dataset", [None, tiny_ids(6, 16)])
def test_a_model_is_quantized_saved_and_run(dataset, tmp_path):
    source, folder = save_tiny_model("llama", tmp_path / "dense"), tmp_path / "quantized"
    options = config(dataset=dataset, num_samples=6, sequence_length=16)
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=options)
    model.save_pretrained(folder)
    restored = AutoModelForCausalLM.from_pretrained(folder)
    dense = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        found, again, wanted = (one(tiny_ids()).logits for one in (model, restored, dense))
    assert torch.equal(found, again)
    assert (found - wanted).square().mean() < 2 * wanted.square().mean()
    if dataset is not None:
        assert model.hf_quantizer.report.mean_relative_error < 0.4
        return
    for name in ("model.layers.1.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        weight = dense.get_submodule(name).weight
        error = model.get_submodule(name).dequantize() - weight
        assert 0.1 < error.square().sum() / weight.square().sum() < 0.4
