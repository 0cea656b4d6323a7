"""Tuning with less memory gives the same result, and the estimate of the memory is one of the truth."""

from __future__ import annotations

import logging

import pytest
import torch

from tests.finetune.conftest import IDS, pair
from transformers_quip.config.tune import TuneOptions
from transformers_quip.finetune import memory, record, tune_vectors
from transformers_quip.finetune.head import hidden_states
from transformers_quip.finetune.memory import blocks_of, decoded_bytes, estimate, recomputed
from transformers_quip.finetune.student import tuned
from transformers_quip.nn import QuipLinear
from transformers_quip.nn.replace import quantized_linears

OPTIONS = {"epochs": 2, "batch_size": 4, "held_out": 8, "learning_rate": 1e-2}


def gradients(model, keep, recompute):
    with tuned(model, IDS[:1], keep=keep) as student:
        blocks = blocks_of(model, student.linears)
        assert [linear.weight is None for linear in student.linears.values()] == [not keep] * len(student.linears)
        if recompute:
            with recomputed(blocks):
                hidden_states(model, IDS[:3]).square().sum().backward()
        else:
            hidden_states(model, IDS[:3]).square().sum().backward()
        return {name: value.grad for name, value in student.trained().items()}


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize(("keep", "recompute"), [(False, False), (True, True), (False, True)])
def test_the_same_gradients(arch, keep, recompute):
    _, model = pair(arch)
    expected = gradients(model, True, False)
    found = gradients(model, keep, recompute)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4 * value.abs().max().item())


def test_recomputing_keeps_less_and_leaves_no_trace():
    _, model = pair("llama")

    def kept():
        sizes = {}

        def pack(x):
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            output = hidden_states(model, IDS[:3])
        return sum(sizes.values()), output

    with tuned(model, IDS[:1]) as student:
        blocks = blocks_of(model, student.linears)
        everything, _ = kept()
        with recomputed(blocks):
            less, _ = kept()
        again, _ = kept()
    assert less < everything / 3
    assert again == pytest.approx(everything, rel=0.01)
    assert not any("forward" in block.__dict__ for block in blocks)


@pytest.mark.parametrize("windows", [4, 12])
def test_the_estimate_of_the_activations(windows):
    _, model = pair("llama")
    with tuned(model, IDS[:1]) as student:
        blocks = blocks_of(model, student.linears)
        found = estimate(blocks, student, lambda: hidden_states(model, IDS[:1]), (20, 20 * windows), 1000)
        truth, alive = {}, []

        def pack(x):
            alive.append(x)
            truth[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            hidden_states(model, IDS[:windows])
        parameters = sum(p.untyped_storage().nbytes() for p in model.parameters())
        trained = sum(value.numel() for value in student.trained().values())
    assert found.activations == pytest.approx(sum(truth.values()), rel=0.3, abs=parameters)
    assert found.inputs == 2 * windows * 20 * 64 * 4  # two blocks, float32 [windows, 20, 64]
    assert found.block <= found.activations <= 2 * found.block
    linears = [module for module in model.modules() if isinstance(module, QuipLinear)]
    assert found.weights == decoded_bytes(linears) == sum(m.in_features * m.out_features for m in linears) * 4
    assert found.largest == max(m.in_features * m.out_features for m in linears) * 4
    assert found.state == trained * 20
    assert found.total(True, False) == found.weights + found.activations + found.state + 1000
    assert found.total(False, True) == found.largest + found.block + found.inputs + found.state + 1000


def test_little_memory_gives_the_same_result(monkeypatch, caplog):
    results = {}
    for free in (1 << 40, 0):
        dense, model = pair("llama")
        teacher = record(dense, IDS)
        monkeypatch.setattr(memory, "free_memory", lambda device, free=free: free)
        decoded = []
        with monkeypatch.context() as patch, caplog.at_level(logging.INFO):
            patch.setattr(QuipLinear, "dequantize", counted(QuipLinear.dequantize, decoded))
            results[free] = tune_vectors(model, teacher, TuneOptions(**OPTIONS), progress=False), len(decoded), model
    assert "8 steps of 4 windows" in caplog.text
    linears = len(quantized_linears(results[0][2]))
    assert results[1 << 40][1] == linears  # once each
    assert results[0][1] > 8 * 2 * linears  # in each forward and each backward pass
    first, second = (results[free][0] for free in (1 << 40, 0))
    assert second.verdict.after == pytest.approx(first.verdict.after, rel=1e-3)
    assert second.verdict.after < second.verdict.before


def counted(function, calls):
    def counting(self, *args, **kwargs):
        calls.append(self)
        return function(self, *args, **kwargs)

    return counting


def test_blocks_are_found_by_the_names_of_the_linears():
    _, model = pair("gpt2")
    assert blocks_of(model, quantized_linears(model)) == list(model.transformer.h)
    lone = torch.nn.Module()
    lone.linear = torch.nn.Linear(2, 2)
    assert blocks_of(lone, ["linear"]) == [lone]
