"""Tuning brings a quantized model nearer to the dense one on text that it has not seen, or changes nothing."""

from __future__ import annotations

import copy
import json
import logging

import pytest
import torch

from tests.finetune.conftest import IDS, pair
from tests.models import tiny_model
from transformers_quip import QuipConfig
from transformers_quip.finetune import TuneOptions, Verdict, record, tune_vectors, window_divergences
from transformers_quip.finetune.end_to_end import student_head
from transformers_quip.finetune.loss import window_order
from transformers_quip.quantize.recipe import quantize_model

OPTIONS = TuneOptions(epochs=12, batch_size=4, held_out=8, learning_rate=2e-2)


def divergence(model, dense, ids):
    """The mean KL(dense ‖ model) over all positions, by the formula, in float64."""
    with torch.no_grad():
        p, q = (m(input_ids=ids).logits.double().log_softmax(-1) for m in (dense, model))
    return (p.exp() * (p - q)).sum(-1).mean().item()


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def models(request):
    return pair(request.param)


def test_it_gets_nearer_to_the_dense_model_and_never_touches_the_codes(models):
    dense, model = models[0], copy.deepcopy(models[1])
    codes = {n: p.clone() for n, p in model.named_parameters() if "codes" in n}
    other = torch.randint(3, 128, (8, 20), generator=torch.Generator().manual_seed(77))
    before = divergence(model, dense, IDS[16:]), divergence(model, dense, other)
    report = tune_vectors(model, record(dense, IDS), OPTIONS, progress=False)
    after = divergence(model, dense, IDS[16:]), divergence(model, dense, other)
    assert report.verdict.accepted
    # bfloat16 states of the teacher
    assert report.verdict.before == pytest.approx(before[0], rel=0.02)
    assert report.verdict.after == pytest.approx(after[0], rel=0.02)
    assert after[0] < 0.9 * before[0]
    assert after[1] < 0.95 * before[1]
    assert all(torch.equal(value, codes[name]) for name, value in model.named_parameters() if "codes" in name)
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if "codes" in name)
    assert report.steps == 12 * 16 // 4 == report.history[-1]["step"]
    assert report.tokens == 16 * 20
    assert json.loads(json.dumps(report.to_dict()))["kept"] is True
    best = min(look["held_out"] for look in report.history)
    assert report.verdict.after == pytest.approx(best, rel=1e-3)


def test_two_runs_are_the_same(models):
    dense, first = models[0], copy.deepcopy(models[1])
    second, options = copy.deepcopy(first), TuneOptions(epochs=1, batch_size=4, held_out=8, learning_rate=2e-2)
    teacher = record(dense, IDS)
    for model in (first, second):
        tune_vectors(model, teacher, options, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_what_does_not_help_is_undone(models, caplog):
    dense, model = models[0], copy.deepcopy(models[1])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wild = TuneOptions(epochs=2, batch_size=4, held_out=8, learning_rate=20.0, clip=1e9, warmup=0)
    with caplog.at_level(logging.WARNING, logger="transformers_quip"):
        report = tune_vectors(model, record(dense, IDS), wild, progress=False)
    assert not report.verdict.accepted
    assert "did not help" in caplog.text
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_too_little_text(models):
    with pytest.raises(ValueError, match="at least 4 windows to train on and 8 held out, got 10"):
        tune_vectors(models[1], record(models[0], IDS[:10]), OPTIONS, progress=False)


def test_another_vocabulary(models):
    other = tiny_model("llama", vocab_size=100)
    ids = IDS.clamp_max(99)
    with pytest.raises(ValueError, match="predicts 128 tokens and its teacher 100"):
        tune_vectors(models[1], record(other, ids), OPTIONS, progress=False)


def test_window_divergences(models):
    dense, model = models
    teacher = record(dense, IDS)
    found = window_divergences(model, teacher, student_head(model, teacher, IDS[:1, :4]), [3, 5, 23], batch_size=2)
    expected = [divergence(model, dense, IDS[n : n + 1]) for n in (3, 5, 23)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0.02, atol=1e-3)


def test_verdict():
    before = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    assert Verdict.of(before, before - 0.1).accepted
    assert not Verdict.of(before, before).accepted
    noisy = before + torch.tensor([-1.0, 0.9, -1.0, 0.9])  # better by 0.05, known to ±0.55
    assert not Verdict.of(before, noisy).accepted
    assert Verdict.of(before, noisy).error == pytest.approx(1.9 / 2 * (4 / 3) ** 0.5 / 2)
    assert not Verdict.of(before, before * float("nan")).accepted
    assert not Verdict.of(before, before - torch.inf).accepted


def test_order_reads_every_window_once_before_any_twice():
    order = window_order(5, 13, seed=3)
    assert len(order) == 13
    assert sorted(order[:5]) == sorted(order[5:10]) == [0, 1, 2, 3, 4]
    assert order == window_order(5, 13, seed=3) != window_order(5, 13, seed=4)


@pytest.mark.parametrize("earlier", [None, {"kept": True}])
def test_a_result_without_gain_does_not_replace_the_record_of_a_gain(models, earlier):
    dense, model = models[0], copy.deepcopy(models[1])
    model.config.quantization_config = QuipConfig(bits=2)
    if earlier:
        model.config.quantization_config.calibration = {"tokens": 6, "tuning": earlier}
    wild = TuneOptions(epochs=1, batch_size=4, held_out=8, learning_rate=20.0, clip=1e9, warmup=0)
    tune_vectors(model, record(dense, IDS), wild, progress=False)
    calibration = model.config.quantization_config.calibration
    assert calibration["tuning"]["kept"] is (earlier is not None)
    assert calibration.get("tokens") == (6 if earlier else None)


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_on_request(tied):
    dense, model = pair("llama", tie_word_embeddings=tied)
    before = {name: value.clone() for name, value in model.named_parameters()}
    names = {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})
    teacher = record(dense, IDS)
    without = copy.deepcopy(model)
    tune_vectors(without, teacher, TuneOptions(epochs=4, batch_size=4, held_out=8, learning_rate=2e-2), progress=False)
    options = TuneOptions(epochs=4, batch_size=4, held_out=8, learning_rate=2e-2, embeddings=True, embedding_rate=0.2)
    report = tune_vectors(model, teacher, options, progress=False)
    assert report.verdict.accepted
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    for name in names:
        assert not torch.equal(model.get_parameter(name), before[name]), name
        assert torch.equal(without.get_parameter(name), before[name]), name
        assert not model.get_parameter(name).requires_grad or before[name].requires_grad
    assert divergence(model, dense, IDS[16:]) < divergence(without, dense, IDS[16:])
    assert report.trained > sum(before[name].numel() for name in names)


def test_embeddings_are_restored_after_a_loss():
    dense, model = pair("llama")
    before = {name: value.clone() for name, value in model.named_parameters()}
    options = TuneOptions(epochs=1, batch_size=4, held_out=8, learning_rate=50.0, embeddings=True, embedding_rate=1.0)
    assert not tune_vectors(model, record(dense, IDS), options, progress=False).verdict.accepted
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_quantized_embeddings_cannot_be_trained():
    dense = tiny_model("llama", tie_word_embeddings=False)
    model = copy.deepcopy(dense)
    config = QuipConfig(bits=2, dataset=IDS[:8], sequence_length=20, num_samples=8, modules={"embed_tokens": {"bits": 4}})
    quantize_model(model, config)
    with pytest.raises(ValueError, match="can only be trained while they are dense, and one is a QuipEmbedding"):
        tune_vectors(model, record(dense, IDS), TuneOptions(held_out=8, embeddings=True), progress=False)
