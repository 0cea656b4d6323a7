"""PEFT on top of a quantized model: adapters train, what needs the dense weight is refused with the way out."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from transformers_quip import QuipLinear

peft = pytest.importorskip("peft", reason="peft is not installed")


@pytest.fixture
def model(quantized):
    return AutoModelForCausalLM.from_pretrained(quantized("llama"))


def lora(**options):
    return peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **options)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_trains_and_reloads(model, quantized, ids, tmp_path, checkpointing):
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    adapted = peft.get_peft_model(model, lora()).train()
    q_proj = adapted.base_model.model.model.layers[0].self_attn.q_proj
    assert isinstance(q_proj.base_layer, QuipLinear)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(4):
        loss = adapted(ids, labels=ids).loss
        losses.append(loss.item())
        loss.backward()
        assert all(p.grad is not None for n, p in adapted.named_parameters() if "lora_" in n)
        assert all(p.grad is None for p in q_proj.base_layer.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    adapted.eval().save_pretrained(tmp_path)
    reloaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(quantized("llama")), tmp_path)
    assert torch.equal(reloaded(ids).logits, adapted(ids).logits)


def test_conv1d_models_take_lora(quantized, ids):
    model = AutoModelForCausalLM.from_pretrained(quantized("gpt2"))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["c_attn", "c_fc"]))
    adapted(ids, labels=ids).loss.backward()
    assert adapted.base_model.model.transformer.h[0].attn.c_attn.lora_A.default.weight.shape == (4, 64)


def test_native_add_adapter(model, ids):
    before = model(ids).logits
    try:
        model.add_adapter(lora())
    except ValueError as error:
        if "version of PEFT" not in str(error):
            raise
        pytest.skip(str(error))  # Transformers 5.24 asks for a PEFT newer than the one that is installed
    assert not torch.equal(model(ids).logits, before)


@pytest.mark.parametrize(
    "config",
    [
        peft.IA3Config(target_modules=["q_proj", "up_proj"], feedforward_modules=["up_proj"]),
        peft.VeraConfig(target_modules=["q_proj"], r=4),
        peft.LoHaConfig(target_modules=["q_proj"], r=4),
    ],
    ids=["ia3", "vera", "loha"],
)
def test_other_adapters(model, ids, config):
    peft.get_peft_model(model, config)(ids, labels=ids).loss.backward()


@pytest.mark.parametrize(
    "use",
    [
        lambda model: peft.get_peft_model(model, lora()).merge_adapter(),
        lambda model: peft.get_peft_model(model, lora()).merge_and_unload(),
        lambda model: peft.get_peft_model(model, lora()).merge_adapter(safe_merge=True),
        lambda model: peft.get_peft_model(model, lora(use_dora=True)).merge_and_unload(),
    ],
    ids=["merge", "merge_and_unload", "safe_merge", "dora"],
)
def test_merging_is_refused(model, use):
    with pytest.raises(ValueError, match=r"Merging adapters needs a dense weight: call model\.dequantize\(\) .* or round"):
        use(model)


def test_merging_into_the_dequantized_model(model, ids):
    model.dequantize()
    adapted = peft.get_peft_model(model, lora()).eval()
    logits = adapted(ids).logits
    torch.testing.assert_close(adapted.merge_and_unload()(ids).logits, logits, rtol=1e-4, atol=1e-4)
