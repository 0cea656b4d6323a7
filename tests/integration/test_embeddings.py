"""Quantized embeddings in a model: with and without calibration, saved, loaded, dequantized, trained on."""

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from tests.models import tiny_ids
from transformers_quip import QuipConfig
from transformers_quip.calibration import capture_inputs, find_blocks
from transformers_quip.checkpoints.inventory import read_folder
from transformers_quip.evaluation import linear_sizes
from transformers_quip.nn import QuipEmbedding, QuipLinear

BOTH = {"embed_tokens": {"bits": 4}, "lm_head": {"bits": 4}}
DATA = {"dataset": tiny_ids(4, 16, seed=5), "num_samples": 4, "sequence_length": 16, "refinement_sweeps": 1}


@pytest.mark.parametrize(
    "options",
    [{"dataset": None}, {**DATA, "batch_size": 1}, {**DATA, "bits": 2.5}],
    ids=["uncalibrated", "calibrated", "average"],
)
@torch.no_grad()
def test_the_whole_way(options, dense, ids, tmp_path):
    config = QuipConfig(**{"bits": 3, **options}, modules=BOTH)
    model = AutoModelForCausalLM.from_pretrained(dense("llama"), quantization_config=config)
    table = AutoModelForCausalLM.from_pretrained(dense("llama")).model.embed_tokens.weight
    embedding = model.model.embed_tokens
    assert isinstance(embedding, QuipEmbedding)
    assert isinstance(model.lm_head, QuipLinear)
    assert ((embedding.dequantize() - table).square().sum() / table.square().sum()).item() < 0.0095
    assert not any(p.requires_grad for p in (*embedding.parameters(), *model.lm_head.parameters()))
    logits = model(ids).logits
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        names = {name.rpartition(".")[2] for name in file.keys() if name.startswith("model.embed_tokens.")}  # noqa: SIM118
    assert names == {"codes", "codes_residual", "su", "sv"}
    inventory = read_folder(tmp_path)
    stored = next(linear for linear in inventory.linears if linear.name == "model.embed_tokens")
    assert (stored.weights, stored.bytes) == (table.numel(), embedding.packed_bytes)
    assert inventory.parameters == sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(dense("llama")).parameters())
    size = {size.name: size for size in linear_sizes(model)}["model.embed_tokens"]
    assert (size.weights, size.bytes) == (table.numel(), 128 * 64 // 2 + 4 * (128 + 64))
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(reloaded(ids).logits, logits)
    halved = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert halved(ids).logits.dtype == halved.model.embed_tokens(ids).dtype == torch.bfloat16
    restored = reloaded.dequantize()
    assert type(restored.model.embed_tokens) is torch.nn.Embedding
    torch.testing.assert_close(restored(ids).logits, logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("follow", ["dense", "quantized", "mixed"])
def test_which_batches_come_from_the_quantized_table(follow, dense, monkeypatch):
    from transformers_quip.quantize import recipe

    entering = {}

    def remember(block, inputs, *arguments):
        entering.setdefault("hidden", [hidden.clone() for hidden in inputs.hidden])
        return quantize_block(block, inputs, *arguments)

    quantize_block = recipe.quantize_block
    monkeypatch.setattr(recipe, "quantize_block", remember)
    config = QuipConfig(**DATA, batch_size=1, calibrate_on=follow, modules={"embed_tokens": {"bits": 4}})
    quantized = AutoModelForCausalLM.from_pretrained(dense("llama"), quantization_config=config)
    plain = AutoModelForCausalLM.from_pretrained(dense("llama"))
    wanted = [capture_inputs(m, find_blocks(m)[1], DATA["dataset"], 1, progress=False).hidden for m in (plain, quantized)]
    chosen = {"dense": [0, 0, 0, 0], "quantized": [1, 1, 1, 1], "mixed": [1, 0, 1, 0]}[follow]
    assert not torch.equal(wanted[0][0], wanted[1][0])
    for batch, which in enumerate(chosen):
        assert torch.equal(entering["hidden"][batch], wanted[which][batch])


def test_a_missing_table_is_named(dense, tmp_path):
    from safetensors.torch import load_file, save_file

    config = QuipConfig(dataset=None, bits=4, modules={"embed_tokens": {"bits": 4}})
    AutoModelForCausalLM.from_pretrained(dense("llama"), quantization_config=config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.embed_tokens.sv"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.sv is missing"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_adapters_on_the_table_train(dense, ids):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = QuipConfig(dataset=None, bits=4, modules={"embed_tokens": {"bits": 4}})
    model = AutoModelForCausalLM.from_pretrained(dense("llama"), quantization_config=config)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"])).train()
    embedding = adapted.base_model.model.model.embed_tokens
    assert isinstance(embedding.base_layer, QuipEmbedding)
    adapted(ids, labels=ids).loss.backward()
    assert embedding.lora_embedding_A.default.grad.abs().max() > 0  # B's is 0 at first, as A is
    assert all(p.grad is None for p in embedding.base_layer.parameters())
