"""Tiny modules of experts, one for each kind that Transformers has, and random inputs for them."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from transformers_quip.nn.stacks import find_stacks

EXPERTS, HIDDEN, INNER, TOKENS, CHOSEN = 4, 24, 32, 7, 2
_CONFIG: dict[str, Any] = {
    "_experts_implementation": "eager",
    **dict.fromkeys(("num_local_experts", "moe_num_experts", "n_routed_experts", "num_experts"), EXPERTS),
    **dict.fromkeys(("hidden_size", "moe_hidden_size"), HIDDEN),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "expert_ffn_hidden_size"), INNER),
    **dict.fromkeys(("hidden_act", "mlp_hidden_act"), "silu"),
    "moe_latent_size": None,
    "swiglu_alpha": 1.7,
    "swiglu_limit": 0.8,
    "zero_expert_num": 2,
    "n_shared_experts": 3,
    "post_norm_eps": 1e-6,
    "rms_norm_eps": 1e-6,
    "ffn_hidden_size": INNER,
    "ffn_act_fn": {"name": "silu"},
}
# The class of each kind.
KINDS = {
    "standard": ("mixtral", "MixtralExperts"),
    "own gate function": ("deepseek_v4", "DeepseekV4Experts"),
    "own gate function, undecorated": ("step3p7", "Step3p7Experts"),
    "norm after each expert": ("muse_spark", "MuseSparkExperts"),
    "transposed": ("aria", "AriaExperts"),
    "interleaved, biased": ("gpt_oss", "GptOssExperts"),
    "without gate": ("nemotron_h", "NemotronHExperts"),
    "experts that return their input": ("longcat_flash", "LongcatFlashExperts"),
    "all tokens for each": ("llama4", "Llama4TextExperts"),
    "one projection": ("jetmoe", "JetMoeParallelExperts"),
    "shared": ("inkling", "InklingSharedExperts"),
}
# Those whose own forward is not replaced.
UNROUTED = ("experts that return their input", "all tokens for each", "one projection", "shared")


# A module around another with all matrices of one projection below each other.
FLAT = ("dbrx", "DbrxExperts")


def dense_experts(kind: str, seed: int = 0) -> nn.Module:
    """A module with random weights; skips the test where this Transformers does not have it."""
    package, name = FLAT if kind == "flat" else KINDS[kind]
    try:
        found = getattr(importlib.import_module(f"transformers.models.{package}.modeling_{package}"), name)
    except (ImportError, AttributeError):
        pytest.skip(f"this Transformers has no {name}")
    arguments = (EXPERTS, HIDDEN, INNER) if kind == "one projection" else (SimpleNamespace(**_CONFIG),)
    module = found(*arguments)
    if kind != "flat" and not find_stacks(module):
        pytest.skip(f"{name} has another form in this Transformers")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return module.eval()


def inputs(kind: str, seed: int = 1) -> tuple:
    """Random arguments of its forward; expert 2 gets no token."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, HIDDEN, generator=generator)
    if kind == "one projection":
        return x, [3, 0, 0, 4]
    if kind == "shared":
        return x, torch.rand(TOKENS, 3, generator=generator)
    experts = EXPERTS + 2 if kind == "experts that return their input" else EXPERTS
    scores = torch.rand(TOKENS, experts, generator=generator)
    scores[:, 2] = -1
    weights, chosen = scores.topk(CHOSEN, dim=-1)
    if kind == "all tokens for each":
        scores = torch.zeros_like(scores).scatter_(1, chosen, weights)
        return ((x.repeat(experts, 1) * scores.T.reshape(-1, 1)),)
    return x, chosen, weights
