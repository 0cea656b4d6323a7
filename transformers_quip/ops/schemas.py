"""The ops of `torch.ops.quip`: signatures, and fakes that give the shape and type of results without computing them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .layer import BUNDLE_SCHEMA as BUNDLE
from .layer import GROUPED_SCHEMA as GROUPED
from .layer import SCHEMA as LAYER
from .layer import Layer

SCHEMAS = {
    # Q x along the last dimension (Qᵀ x if transpose); Q = incoherence.get(incoherence, x.shape[-1], seed).
    "transform": "(Tensor x, str incoherence, int seed, bool transpose) -> Tensor",
    # The weight Ŵ [rows, columns], decoded from stored tensors.
    "decode": "(Tensor[] weight, str codebook, SymInt rows, SymInt columns, ScalarType dtype) -> Tensor",
    # sv ⊙ Q_out(Ŵ Q_inᵀ(su ⊙ x)) + bias for x [..., n]: [..., m] in the dtype of x.
    "linear": f"(Tensor x, {LAYER}) -> Tensor",
    # The outputs of several linears for one x, one after the other: [..., Σ m] in the dtype of x.
    "bundle": f"(Tensor x, {BUNDLE}) -> Tensor",
    # For x [tokens, n] sorted by expert, row i times the weight of its expert: [tokens, m] in the dtype of x. Tokens from
    # ends[e−1] to ends[e] belong to expert e; the rows of those from ends[−1] on are zeros.
    "grouped_linear": f"(Tensor x, {GROUPED}) -> Tensor",
    # The derivative of the sum of grad ⊙ grouped_linear(x) with respect to x: [tokens, n] in the dtype of grad [tokens, m].
    "grouped_linear_backward": f"(Tensor grad, {GROUPED}) -> Tensor",
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


def bundle(
    x: torch.Tensor, weight: Sequence[torch.Tensor], su: Sequence[torch.Tensor], sv: Sequence[torch.Tensor], linears: str
) -> torch.Tensor:
    """Fake of quip::bundle."""
    return x.new_empty((*x.shape[:-1], sum(v.shape[0] for v in sv)))


def grouped_linear(
    x: torch.Tensor, ends: torch.Tensor, weight: Sequence[torch.Tensor], su: torch.Tensor, sv: torch.Tensor, *names: Any
) -> torch.Tensor:
    """Fake of quip::grouped_linear."""
    return x.new_empty((x.shape[0], sv.shape[-1]))


def grouped_linear_backward(
    grad: torch.Tensor, ends: torch.Tensor, weight: Sequence[torch.Tensor], su: torch.Tensor, sv: torch.Tensor, *names: Any
) -> torch.Tensor:
    """Fake of quip::grouped_linear_backward."""
    return grad.new_empty((grad.shape[0], su.shape[-1]))


def define() -> None:
    """Define every op and its fake."""
    for name, schema in SCHEMAS.items():
        torch.library.define(f"quip::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))
    for fake in (transform, decode, linear, bundle, grouped_linear, grouped_linear_backward):
        torch.library.register_fake(f"quip::{fake.__name__}", fake)
