"""Adapters that begin with the error of the quantized weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.models import LAYERS, save_tiny_model, tiny_model
from tests.peft.conftest import IDS
from transformers_quip import QuipLinear
from transformers_quip.evaluation import divergence
from transformers_quip.peft import residual_init
from transformers_quip.peft.dense import DenseWeights

peft = pytest.importorskip("peft", reason="PEFT is not installed")

DATA = {"dataset": IDS[:16], "num_samples": 16, "sequence_length": 20}
Q_PROJ = "model.layers.0.self_attn.q_proj"


def residual(quantized: QuipLinear, dense: nn.Module) -> torch.Tensor:
    weight = dense.weight.detach().double()
    return (weight.T if quantized.conv1d else weight) - quantized.dequantize(torch.float64)


def product(layer) -> torch.Tensor:
    return layer.get_delta_weight("default").detach().double()


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_without_data_it_is_the_truncated_decomposition(folders, load, arch):
    dense_folder, folder = folders(arch)
    adapted = residual_init(load(folder), dense_folder, rank=5, progress=False)
    assert isinstance(adapted, peft.PeftModel)
    dense, checked = load(dense_folder), 0
    for name, layer in adapted.get_base_model().named_modules():
        if isinstance(getattr(layer, "base_layer", None), QuipLinear):
            u, s, v = torch.linalg.svd(residual(layer.base_layer, dense.get_submodule(name)), full_matrices=False)
            torch.testing.assert_close(product(layer), u[:, :5] * s[:5] @ v[:5], rtol=1e-3, atol=1e-5)
            checked += 1
    assert checked == (14 if arch == "llama" else 8)
    assert divergence(adapted, dense, IDS).mean < divergence(load(folder), dense, IDS).mean
    assert all(p.requires_grad == ("lora_" in name) for name, p in adapted.named_parameters())


def test_at_full_rank_nothing_is_lost(folders, load):
    dense_folder, folder = folders("llama")
    dense = load(dense_folder)
    for data in ({}, DATA):
        adapted = residual_init(load(folder), dense, rank=96, progress=False, **data)
        with torch.no_grad():
            torch.testing.assert_close(adapted(IDS).logits, dense(IDS).logits, rtol=1e-3, atol=1e-3)


def test_with_data_it_is_the_best_for_the_inputs_of_each_layer(folders, load):
    """Against EoRA's formula on the inputs that the finished model gives to the layers, in float64."""
    dense_folder, folder = folders("llama")
    adapted = residual_init(load(folder), dense_folder, rank=3, progress=False, **DATA)
    dense, base = load(dense_folder), adapted.get_base_model()
    # layers of block 1 that read the block's input, which the adapters of block 0 have a part in
    layers = {
        f"model.layers.1.self_attn.{n}_proj": base.model.layers[1].self_attn.get_submodule(f"{n}_proj") for n in "qkv"
    }
    seen = []
    hook = layers["model.layers.1.self_attn.q_proj"].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        adapted(IDS[:16])
    hook.remove()
    x = seen[0].flatten(0, 1).double()
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    root, inverse = ((vectors * values**power) @ vectors.T for power in (0.5, -0.5))
    for name, layer in layers.items():
        error = residual(layer.base_layer, dense.get_submodule(name))
        u, s, v = torch.linalg.svd(error @ root, full_matrices=False)
        best = u[:, :3] * s[:3] @ v[:3] @ inverse
        lost, least = ((error - found) @ root for found in (product(layer), best))
        assert lost.square().sum().item() == pytest.approx(least.square().sum().item(), rel=1e-4)
    without = residual_init(load(folder), dense_folder, rank=3, progress=False)
    assert divergence(adapted, dense, IDS[:16]).mean < divergence(without, dense, IDS[:16]).mean


def test_a_model_with_adapters_keeps_their_config(folders, load):
    dense_folder, folder = folders("llama")
    config = peft.LoraConfig(
        r=4, lora_alpha=32, use_rslora=True, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 6},
        lora_dropout=0.5, init_lora_weights=False,
    )  # fmt: skip
    adapted = peft.get_peft_model(load(folder), config)
    assert residual_init(adapted, dense_folder, progress=False, **DATA) is adapted
    base, dense = adapted.get_base_model(), load(dense_folder)
    for name, rank in ((Q_PROJ, 4), ("model.layers.1.mlp.down_proj", 6)):
        layer = base.get_submodule(name)
        error = residual(layer.base_layer, dense.get_submodule(name))
        assert torch.linalg.matrix_rank(product(layer), rtol=1e-4) == rank
        # an oblique projection onto a subspace of the outputs: U Uᵀ (R - BA) = 0 for the columns U of B
        u = torch.linalg.svd(product(layer), full_matrices=False).U[:, :rank]
        torch.testing.assert_close(u @ (u.T @ error), product(layer), rtol=1e-3, atol=1e-5)
        a, b = layer.lora_A.default.weight, layer.lora_B.default.weight
        torch.testing.assert_close(a.norm(), b.norm())  # evenly shared, whatever lora_alpha


def test_earlier_values_have_no_part(folders, load):
    dense_folder, folder = folders("llama")
    config = peft.LoraConfig(r=3, lora_alpha=3, target_modules="all-linear", init_lora_weights=False)
    first = residual_init(peft.get_peft_model(load(folder), config), dense_folder, progress=False, **DATA)
    second = residual_init(load(folder), dense_folder, rank=3, progress=False, **DATA)
    for layer in ("q_proj", "o_proj"):
        found = [m.get_base_model().model.layers[1].self_attn.get_submodule(layer) for m in (first, second)]
        torch.testing.assert_close(*map(product, found))


def test_it_trains_and_reloads(folders, load, tmp_path):
    dense_folder, folder = folders("llama")
    adapted = residual_init(load(folder), dense_folder, rank=4, progress=False).train()
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(4):
        loss = adapted(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    adapted.eval().save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(load(folder), tmp_path)
    assert torch.equal(again(IDS).logits, adapted(IDS).logits)


def test_dense_weights_are_read_one_at_a_time(folders, load, monkeypatch):
    dense_folder = folders("llama")[0]
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("it was loaded"))
    weights = DenseWeights(dense_folder, tiny_model("llama"))
    assert all(p.is_meta for p in weights._model.parameters())
    assert weights.weight(Q_PROJ, (64, 64)).shape == (64, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 4, "config": peft.LoraConfig(r=4)}, "rank or config, not both"),
        ({"config": peft.LoraConfig(target_modules=["lm_head"])}, "no LoRA layer on a quantized linear"),
        ({"config": peft.LoraConfig(target_modules=["q_proj"], use_dora=True)}, "q_proj has a variant of LoRA"),
        ({"niter": -1}, "niter=-1 must be 0 or more"),
        ({"dataset": []}, r"dataset=\[\] is empty"),
        ({"dataset": IDS + 128, "sequence_length": 20}, "vocabulary"),
    ],
)
def test_what_is_refused(folders, load, options, message):
    dense_folder, folder = folders("llama")
    model = load(folder)
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        residual_init(model, dense_folder, progress=False, **options)
    assert [name for name, _ in model.named_modules()] == names  # without adapters


def test_models_that_do_not_fit(folders, load, tmp_path):
    dense_folder, folder = folders("llama")
    with pytest.raises(ValueError, match="has no quantized linears"):
        residual_init(load(dense_folder), dense_folder)
    with pytest.raises(ValueError, match="is a quantized model"):
        residual_init(load(folder), folder)
    load(dense_folder).config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no model.safetensors"):
        residual_init(load(folder), tmp_path)
    for gpt2 in (folders("gpt2")[0], tiny_model("gpt2")):
        with pytest.raises(ValueError, match="its model_type is gpt2, and that of the quantized model is llama"):
            residual_init(load(folder), gpt2)
    deeper = tiny_model("llama", num_hidden_layers=LAYERS + 1)
    with pytest.raises(ValueError, match=f"LlamaForCausalLM is not the dense model .* num_hidden_layers is {LAYERS + 1}"):
        residual_init(load(folder), deeper)
    with pytest.raises(ValueError, match="has no module model.layers.0.self_attn.q_proj"):
        residual_init(load(folder), torch.nn.Module())
    offloaded = load(folder)
    offloaded.model.layers[1].mlp.up_proj.to("meta")
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj is offloaded"):
        residual_init(offloaded, dense_folder)
    with pytest.raises(ValueError, match=r"k_proj has shape \[16, 64\] .* and \[32, 64\]"):
        residual_init(load(folder), tiny_model("llama", num_key_value_heads=1))
    adapted = peft.get_peft_model(load(folder), peft.LoraConfig(r=4))
    with pytest.raises(ValueError, match="leave rank and config out"):
        residual_init(adapted, dense_folder, rank=4)
    other = peft.get_peft_model(load(folder), peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="no LoRA layer"):
        residual_init(other, dense_folder)


def test_weights_that_transformers_splits_need_the_model_itself(folders, load, tmp_path):
    """A checkpoint may store several modules' weights as one tensor, or one module's as several."""
    dense_folder = save_tiny_model("llama", tmp_path)
    weights = DenseWeights(dense_folder, tiny_model("llama"))
    del weights._tensors[f"{Q_PROJ}.weight"]
    with pytest.raises(ValueError, match="does not hold .*q_proj.weight as one tensor: give the loaded model"):
        weights.weight(Q_PROJ, (64, 64))
