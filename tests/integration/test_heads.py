"""Heads of other tasks: left dense, new ones and trained ones, and quantized where they are called by name."""

import logging

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForMaskedLM,
)

from tests.models import tiny_ids
from transformers_quip import QuipConfig
from transformers_quip.nn import QuipLinear, replace
from transformers_quip.quantize.plan import make_plan
from transformers_quip.quantize.reasons import TASK_HEAD

HEADS = {
    AutoModelForSequenceClassification: "score",
    AutoModelForTokenClassification: "score",
    AutoModelForQuestionAnswering: "qa_outputs",
}


def config(**options):
    return QuipConfig(bits=4, dataset=None, **options)


@pytest.mark.parametrize("kind", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_a_new_head_stays_dense(kind, dense, caplog):
    """The checkpoint is a causal model's, which has no such head."""
    with caplog.at_level(logging.INFO):
        model = kind.from_pretrained(dense("llama"), num_labels=2, quantization_config=config())
    head = model.get_submodule(HEADS[kind])
    assert type(head) is torch.nn.Linear
    assert head.weight.requires_grad
    assert len(replace.quantized_linears(model)) == 14
    assert f"{HEADS[kind]} ({TASK_HEAD})" in caplog.text
    assert model(tiny_ids()).logits.isfinite().all()


@pytest.mark.parametrize("kind", HEADS)
def test_a_trained_head_stays_as_it_was_and_is_saved_and_loaded(kind, dense, tmp_path):
    trained = kind.from_pretrained(dense("llama"), num_labels=2)
    head = trained.get_submodule(HEADS[kind])
    torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(0))
    trained.save_pretrained(tmp_path / "trained")
    model = kind.from_pretrained(tmp_path / "trained", quantization_config=config())
    assert torch.equal(model.get_submodule(HEADS[kind]).weight, head.weight)
    model.save_pretrained(tmp_path / "quantized")
    restored = kind.from_pretrained(tmp_path / "quantized")
    assert torch.equal(restored.get_submodule(HEADS[kind]).weight, head.weight)
    first, again = (one(tiny_ids())[0] for one in (model, restored))
    assert torch.equal(first, again)


def test_a_trained_head_is_quantized_where_it_is_named(dense, tmp_path):
    trained = AutoModelForSequenceClassification.from_pretrained(dense("llama"), num_labels=16)
    trained.save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, quantization_config=config(modules={"score": {"bits": 8}})
    )
    assert isinstance(model.score, QuipLinear)
    error = model.score.dequantize() - trained.score.weight
    assert error.square().mean().sqrt() < 0.02 * trained.score.weight.square().mean().sqrt()
    plan = make_plan(trained, config(modules={"*": {"bits": 8}}))  # that calls nothing by name
    assert [entry.name for entry in plan.left_dense()[TASK_HEAD]] == ["score"]


def test_value_heads_and_other_linears_outside_the_base_model_stay_dense(dense):
    model = AutoModelForCausalLM.from_pretrained(dense("llama"))
    model.v_head = torch.nn.Linear(64, 1)
    reasons = {entry.name: entry.reason for entry in make_plan(model, config()).entries if entry.linear}
    assert reasons["v_head"] == TASK_HEAD
    assert reasons["lm_head"] == "output embeddings"
    calibrated = QuipConfig(bits=4)
    reasons = {entry.name: entry.reason for entry in make_plan(model, calibrated).entries if entry.linear}
    assert reasons["v_head"] == "outside the decoder blocks"


def bert():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return BertForMaskedLM(BertConfig(vocab_size=60, **sizes))


def test_a_new_head_for_question_answering_stays_dense(tmp_path):
    bert().save_pretrained(tmp_path)
    model = AutoModelForQuestionAnswering.from_pretrained(tmp_path, quantization_config=config())
    assert type(model.qa_outputs) is torch.nn.Linear
    assert len(replace.quantized_linears(model)) == 12
    assert model(tiny_ids() % 60).start_logits.isfinite().all()


def test_a_new_module_inside_the_base_model_stays_dense(tmp_path, caplog):
    """A masked language model's checkpoint has no pooler: that is initialised at random, as the head is."""
    bert().save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path, quantization_config=config())
    assert "bert.pooler.dense: not in the checkpoint, so initialised at random and left dense" in caplog.text
    assert type(model.bert.pooler.dense) is torch.nn.Linear
    assert type(model.classifier) is torch.nn.Linear
    assert len(replace.quantized_linears(model)) == 12
    assert model(tiny_ids() % 60).logits.isfinite().all()


def test_a_weight_that_is_missing_from_a_block_is_an_error(tmp_path):
    from safetensors.torch import load_file, save_file

    bert().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for key in [key for key in tensors if key.startswith("bert.encoder.layer.1.output.dense")]:
        del tensors[key]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"no bert\.encoder\.layer\.1\.output\.dense\.weight to quantize"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path, quantization_config=config())
