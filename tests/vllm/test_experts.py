"""Quantized experts in vLLM's interface, without an engine: by the dense float64 formula, also shared among processes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed (make test-vllm runs these tests)")

from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe.activation import MoEActivation

from tests import truth
from transformers_quip import QuipConfig
from transformers_quip.vllm.experts import DOWN, GATE_UP, QuipExpertsMethod
from transformers_quip.vllm.parts import Origin

EXPERTS, HIDDEN, INNER, TOKENS, K = 4, 32, 48, 7, 2
NAME = "l.mlp.experts"


@pytest.fixture(autouse=True)
def vllm_config():
    with set_current_vllm_config(VllmConfig(device_config=DeviceConfig("cpu"))):
        yield


def moe(**values):
    given = {"has_bias": False, "activation": MoEActivation.SILU, "size": 1} | values
    return SimpleNamespace(moe_parallel_config=SimpleNamespace(tp_size=given.pop("size")), **given)


def method(**values):
    config = QuipConfig(dataset=None, modules={f"{NAME}.{DOWN}": {"codebook": "scalar3"}})
    origins = {name: Origin.of(config, f"{NAME}.{name}") for name in (GATE_UP, DOWN)}
    return QuipExpertsMethod(moe(**values), origins, NAME)


def checkpoint():
    """The stacked tensors, and each expert's dense weights."""
    tensors, weights = {}, {GATE_UP: [], DOWN: []}
    for name, rows, columns, book in ((GATE_UP, 2 * INNER, HIDDEN, "e8p"), (DOWN, HIDDEN, INNER, "scalar3")):
        parts = [truth.random_linear(rows, columns, seed, codebook=book) for seed in range(EXPERTS)]
        for key in ("codes", "su", "sv"):
            tensors[f"{name}_{key}"] = torch.stack([part[key] for part in parts])
        weights[name] = [truth.weight_between(part, book, truth.hadamard(columns), truth.hadamard(rows)) for part in parts]
    return tensors, weights


def layer_of(expert_map=None):
    layer = torch.nn.Module()
    layer.global_num_experts, layer.activation, layer.expert_map = EXPERTS, MoEActivation.SILU, expert_map
    own = EXPERTS if expert_map is None else int((expert_map >= 0).sum())
    made = method()
    made.create_weights(layer, own, HIDDEN, INNER, torch.float32)
    return layer, made


def routed():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(TOKENS, HIDDEN, generator=generator)
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:K] for _ in range(TOKENS)])
    return x, torch.rand(TOKENS, K, generator=generator), ids.int()


def expected(x, shares, ids, weights):
    y = torch.zeros(TOKENS, HIDDEN, dtype=torch.float64)
    for token in range(TOKENS):
        for share, expert in zip(shares[token].double(), ids[token].tolist(), strict=True):
            gate, up = (weights[GATE_UP][expert] @ x[token].double()).chunk(2)
            y[token] += share * (weights[DOWN][expert] @ (torch.nn.functional.silu(gate) * up))
    return y


@pytest.mark.parametrize("maps", [[None], [[0, -1, 1, -1], [-1, 0, -1, 1]]], ids=["one process", "two processes"])
def test_experts_together_are_the_formula(maps):
    tensors, weights = checkpoint()
    x, shares, ids = routed()
    total = 0
    for given in maps:
        layer, made = layer_of(None if given is None else torch.tensor(given))
        assert set(layer.load_weights(tensors.items())) == set(tensors)
        made.process_weights_after_loading(layer)
        assert len(layer.down_proj_codes) == EXPERTS // len(maps)
        total = total + made.apply(layer, x, shares, ids)
    wanted = expected(x, shares, ids, weights)
    assert (total.double() - wanted).norm() < 1e-5 * wanted.norm()


def test_faults_are_named():
    tensors, _ = checkpoint()
    layer, made = layer_of()
    with pytest.raises(
        ValueError, match=rf"{NAME}\.down_proj_sv is torch\.float32 \[4, 31\] instead of torch\.float32 \[4, 32\]"
    ):
        list(layer.load_weights([("down_proj_sv", tensors["down_proj_sv"][:, 1:])]))
    with pytest.raises(ValueError, match="the checkpoint has down_proj_bias"):
        list(layer.load_weights([("down_proj_bias", torch.zeros(4, 32))]))
    del tensors["gate_up_proj_su"]
    list(layer.load_weights(tensors.items()))
    with pytest.raises(ValueError, match=r"gate_up_proj_su of its experts are not in the checkpoint"):
        made.process_weights_after_loading(layer)


def test_what_is_refused():
    with pytest.raises(ValueError, match="cannot be divided among 2 processes: add --enable-expert-parallel"):
        method(size=2)
    for values in ({"has_bias": True}, {"activation": MoEActivation.SWIGLUOAI}):
        with pytest.raises(ValueError, match="with biases or the activation .* use transformers-quip serve"):
            method(**values)
