"""Fine-tuning with Trainer and TRL: adapters on a quantized base train, nothing else changes, and they reload."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.integration.two_processes import trainer_runs
from tests.models import tiny_tokenizer
from transformers_quip import QuipLinear

peft = pytest.importorskip("peft", reason="PEFT is not installed")
datasets = pytest.importorskip("datasets", reason="datasets is not installed")

TEXTS = ["to be or not to be, that is the question", "in the beginning there were two bits"] * 4
ADAPTERS = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    "dora": lambda: peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_dora=True, task_type="CAUSAL_LM"),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
}


def arguments(kind, output, **more):
    return kind(
        output_dir=str(output),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=4,
        max_steps=12,
        learning_rate=0.05,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **more,
    )


def check(trainer, before, quantized, output):
    """The loss fell, the quantized weights are what they were, and the saved adapters give the same model."""
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 12
    assert sum(losses[-3:]) < sum(losses[:3])
    base = trainer.model.get_base_model()
    found = {n.replace(".base_layer", ""): p for n, p in base.named_parameters() if "lora" not in n and "ia3" not in n}
    kept = [name for name in before if name in found]
    assert sum(".codes" in name for name in kept) == 14
    assert all(torch.equal(found[name], before[name]) for name in kept)
    assert not any(p.requires_grad for m in base.modules() if isinstance(m, QuipLinear) for p in m.parameters())
    trainer.save_model(str(output))
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(quantized), output).eval()
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, trainer.model.eval()(ids).logits)


@pytest.fixture
def model(quantized):
    return AutoModelForCausalLM.from_pretrained(quantized("llama"))


@pytest.mark.parametrize("kind", ADAPTERS)
def test_trainer(model, quantized, tmp_path, kind):
    from transformers import Trainer, TrainingArguments

    if not trainer_runs():
        pytest.skip("Trainer needs a newer accelerate")
    before = {name: value.clone() for name, value in model.named_parameters()}
    rows = [list(map(ord, text[:32])) for text in TEXTS]
    data = datasets.Dataset.from_dict({"input_ids": rows, "labels": rows})
    adapted = peft.get_peft_model(model, ADAPTERS[kind]())
    trainer = Trainer(adapted, arguments(TrainingArguments, tmp_path), train_dataset=data)
    trainer.train()
    check(trainer, before, quantized("llama"), tmp_path / "adapter")


@pytest.mark.parametrize("kind", ADAPTERS)
def test_supervised_fine_tuning_with_trl(model, quantized, tmp_path, kind):
    trl = pytest.importorskip("trl", reason="TRL is not installed (pip install trl)")
    before = {name: value.clone() for name, value in model.named_parameters()}
    trainer = trl.SFTTrainer(
        model,
        args=arguments(trl.SFTConfig, tmp_path, max_length=32),
        train_dataset=datasets.Dataset.from_dict({"text": TEXTS}),
        processing_class=tiny_tokenizer(),
        peft_config=ADAPTERS[kind](),
    )
    trainer.train()
    check(trainer, before, quantized("llama"), tmp_path / "adapter")


def test_preferences_with_trl(model, quantized, tmp_path):
    """DPO: the reference is the quantized model with its adapters switched off."""
    trl = pytest.importorskip("trl", reason="TRL is not installed (pip install trl)")
    before = {name: value.clone() for name, value in model.named_parameters()}
    rows = {"prompt": ["two bits "] * 8, "chosen": ["are enough"] * 8, "rejected": ["are few"] * 8}
    trainer = trl.DPOTrainer(
        model,
        args=arguments(trl.DPOConfig, tmp_path, max_length=32),
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=tiny_tokenizer(),
        peft_config=ADAPTERS["lora"](),
    )
    trainer.train()
    first = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert first == pytest.approx(0.6931, abs=1e-3)  # -log σ(0): the adapters begin as the reference
    check(trainer, before, quantized("llama"), tmp_path / "adapter")
