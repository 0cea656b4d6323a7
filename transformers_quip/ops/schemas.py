"""The ops of `torch.ops.quip`: signatures, and fakes that give the shape and type of results without computing them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .layer import SCHEMA as LAYER
from .layer import Layer

SCHEMAS = {
    # Q x along the last dimension (Qᵀ x if transpose); Q = incoherence.get(incoherence, x.shape[-1], seed).
    "transform": "(Tensor x, str incoherence, int seed, bool transpose) -> Tensor",
    # The weight Ŵ [rows, columns], decoded from stored tensors.
    "decode": "(Tensor[] weight, str codebook, SymInt rows, SymInt columns, ScalarType dtype) -> Tensor",
    # sv ⊙ Q_out(Ŵ Q_inᵀ(su ⊙ x)) + bias for x [..., n]: [..., m] in the dtype of x.
    "linear": f"(Tensor x, {LAYER}) -> Tensor",
}


def transform(x: torch.Tensor, incoherence: str, seed: int, transpose: bool) -> torch.Tensor:
    """Fake of quip::transform."""
    return x.new_empty(x.shape)


def decode(weight: Sequence[torch.Tensor], codebook: str, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Fake of quip::decode."""
    return weight[0].new_empty((rows, columns), dtype=dtype)


def linear(x: torch.Tensor, *layer: Any) -> torch.Tensor:
    """Fake of quip::linear."""
    return x.new_empty((*x.shape[:-1], Layer(*layer).m))


def define() -> None:
    """Define every op and its fake."""
    for name, schema in SCHEMAS.items():
        torch.library.define(f"quip::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))
    for fake in (transform, decode, linear):
        torch.library.register_fake(f"quip::{fake.__name__}", fake)
