"""Tables against the best codes of each row by brute force, and which embeddings are quantized in which models."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tests import truth
from tests.models import tiny_ids, tiny_model
from transformers_quip import QuipConfig
from transformers_quip.codebooks import get
from transformers_quip.nn import QuipEmbedding
from transformers_quip.nn.replace import replace_embedding
from transformers_quip.quantize.embedding import quantize_embedding
from transformers_quip.quantize.plan import make_plan


def table(rows=48, columns=64, seed=0):
    """Rows of very different lengths, and some of zeros."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * torch.linspace(-5, 5, rows).exp()[:, None]
    weight[::16] = 0
    return weight


def reconstructed(weight, config):
    """What `QuipEmbedding` makes of it."""
    model = nn.ModuleDict({"table": nn.Embedding.from_pretrained(weight)})
    result = quantize_embedding(weight, config, "table")
    module = replace_embedding(model, "table", result, config)
    assert isinstance(module, QuipEmbedding)
    return module.dequantize(torch.float64), result


@pytest.mark.parametrize("codebook", ["e8p", "d4"])
def test_each_row_has_the_nearest_points_at_its_best_scale(codebook):
    """By brute force: every point of the whole table, at every scale that is tried, and a fitted factor."""
    weight, config = table(), QuipConfig(codebook=codebook)
    found, result = reconstructed(weight, config)
    points = {"e8p": truth.e8p_table, "d4": truth.d4_table}[codebook]()
    signs, unit = result.su.double(), weight.double().square().mean(1).sqrt() / get(codebook).gaussian_scale
    rotated = (weight.double() * signs) @ truth.hadamard(64)
    for row in range(0, len(weight), 5):
        errors = []
        for factor in get(codebook).scale_factors:
            blocks = (rotated[row] * factor / unit[row]).nan_to_num().reshape(-1, points.shape[1])
            nearest = points[torch.cdist(blocks, points).argmin(1)].flatten()
            fitted = (nearest @ rotated[row]) / nearest.square().sum()
            errors.append((rotated[row] - fitted * nearest).square().sum())
        error = (found[row] - weight[row].double()).square().sum()
        assert error == pytest.approx(min(errors).item(), rel=1e-4)
    assert (found[::16] == 0).all()
    assert (result.su.abs() == 1).all()
    lost = ((found - weight).square().sum() / weight.double().square().sum()).item()
    assert result.statistics["relative_error"] == pytest.approx(lost, rel=1e-4)


@pytest.mark.parametrize(("bits", "bound"), [(2, 0.1), (3, 0.034), (4, 0.0095), (8, 2e-4)])
def test_short_rows_lose_no_more_than_long_ones(bits, bound):
    weight = table(rows=400, columns=128)
    found, _ = reconstructed(weight, QuipConfig(bits=bits, incoherence=("hadamard", "none")))
    lost = ((found - weight).square().sum(1) / weight.double().square().sum(1)).nan_to_num().reshape(4, 100).mean(1)
    assert lost.max() < bound


@pytest.mark.parametrize(("bits", "bound"), [(2, 0.076), (3, 0.0195)])
def test_rows_of_trellis_tiles_have_their_own_scales(bits, bound):
    """Bounds 10 % above the errors of the code on Gaussian weights, for rows whose lengths differ by e^10 within a tile."""
    weight = table(rows=400, columns=128)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(5))
    config = QuipConfig(bits=bits, codebook="trellis", incoherence=("hadamard", "none"))
    found, result = reconstructed(weight[order], config)
    lost = ((found - weight[order]).square().sum(1) / weight[order].double().square().sum(1)).nan_to_num()
    assert lost.mean() < bound
    assert result.tensors["codes"].shape == (400, 128 // 16 * bits)


def test_a_given_scale_is_kept_and_stochastic_rounding_is_random():
    weight = table()
    wide, narrow = (reconstructed(weight, QuipConfig(codebook="scalar4", scale=scale))[1] for scale in (0.5, 1.0))
    # Points lie half as far apart from the weights' ends: sv is twice as large.
    assert ((wide.sv / narrow.sv).nan_to_num(2) - 2).abs().max() < 0.2
    drawn = [quantize_embedding(weight, QuipConfig(codebook="scalar4", rounding="stochastic", seed=s), "t") for s in (0, 1)]
    assert not torch.equal(drawn[0].tensors["codes"], drawn[1].tensors["codes"])


def test_numbers_that_are_none_are_refused():
    weight = table()
    weight[3, 4] = torch.nan
    with pytest.raises(ValueError, match="wte has NaN or Inf"):
        quantize_embedding(weight, QuipConfig(bits=4), "wte")


@pytest.mark.parametrize("dataset", [None, "self"])
@pytest.mark.parametrize("pattern", ["embed_tokens", "*.embed_tokens", "model.embed_tokens"])
def test_the_plan_has_what_is_called_by_name(dataset, pattern):
    model = tiny_model("llama")
    plan = make_plan(model, QuipConfig(dataset=dataset, modules={pattern: {"bits": 4}}))
    assert plan.names[-1] == "model.embed_tokens"
    entry = next(entry for entry in plan.entries if entry.name == "model.embed_tokens")
    assert entry.packed_bytes == 128 * 64 // 2 + (128 + 64) * 4
    assert plan.parameters == sum(p.numel() for p in model.parameters())
    assert "14 of 15 linear layers and 1 embedding, " in plan.summary()


@pytest.mark.parametrize("modules", [None, {"*": {"bits": 4}}, {"model.*": {"bits": 4}}, {"embed_*": {"bits": 4}}])
def test_others_stay_dense(modules):
    plan = make_plan(tiny_model("llama"), QuipConfig(dataset=None, modules=modules))
    assert [entry.name for entry in plan.left_dense()["embedding"]] == ["model.embed_tokens.weight"]


@pytest.mark.parametrize(
    ("arch", "modules", "said"),
    [
        ("qwen3", {"embed_tokens": {"bits": 4}}, "modules names 'model.embed_tokens', but its weight is tied"),
        ("gpt2", {"wte": {"bits": 4}}, "modules names 'transformer.wte', but its weight is tied"),
        ("gemma3", {"embed_tokens": {"bits": 4}}, "which is a Gemma3TextScaledWordEmbedding: only a plain nn.Embedding"),
        (
            "llama",
            {"embed_tokens": {"incoherence": "kronecker"}},
            r"incoherence='kronecker' for the embedding.*only be transformed on the input side: \['kronecker', 'none'\]",
        ),
    ],
)
def test_what_cannot_be_quantized_is_an_error(arch, modules, said):
    with pytest.raises(ValueError, match=said):
        make_plan(tiny_model(arch), QuipConfig(dataset=None, modules=modules))


def test_tables_that_are_not_tied_in_a_model_whose_head_is():
    plan = make_plan(tiny_model("gpt2"), QuipConfig(dataset=None, modules={"wpe": {"bits": 4}}))
    assert plan.names[-1] == "transformer.wpe"


def test_a_model_with_an_embedding_of_tiles_is_saved_and_run(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "dense")
    config = QuipConfig(codebook="trellis", dataset=None, modules={"embed_tokens": {"bits": 3}})
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    assert quantized.model.embed_tokens.codebook == "trellis:mul1:k3:exl3"
    quantized.save_pretrained(tmp_path / "quantized")
    restored = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    ids = tiny_ids()
    with torch.no_grad():
        assert torch.equal(restored(ids).logits, quantized(ids).logits)
    table = model.model.embed_tokens.weight
    error = restored.model.embed_tokens(torch.arange(len(table))) - table
    assert error.square().sum() < 0.022 * table.square().sum()
