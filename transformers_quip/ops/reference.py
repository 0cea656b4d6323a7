"""The ops in plain PyTorch: slow, readable, on every device. They are the definition that faster versions must match."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .. import codebooks
from .. import incoherence as transforms
from . import packing
from .layer import Layer, named


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the ops compute for an input of this one: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def transform(x: torch.Tensor, incoherence: str, seed: int, transpose: bool) -> torch.Tensor:
    """Multiply every vector along the last dimension by the incoherence transform of its size.

    Args:
        x: floating point [..., n].
        incoherence: name of the transform.
        seed: of its random part.
        transpose: multiply by Qᵀ, the inverse, instead of Q.

    Returns:
        [..., n] in the dtype of x, computed in [`compute_dtype`].
    """
    if x.numel() == 0:
        return torch.zeros_like(x, memory_format=torch.contiguous_format)
    y = transform_formula(x, incoherence, seed, transpose)
    # An op may not return its input, which the identity transform does.
    return y.clone() if y.data_ptr() == x.data_ptr() else y.contiguous()


def transform_formula(x: torch.Tensor, incoherence: str, seed: int, transpose: bool) -> torch.Tensor:
    """[`transform`] as PyTorch's own operations, all of which PyTorch can differentiate; it may return x itself."""
    q = transforms.get(incoherence, x.shape[-1], seed)
    y = x.to(compute_dtype(x.dtype)).contiguous()
    return (q.apply_transpose(y) if transpose else q.apply(y)).to(x.dtype)


def decode(weight: Sequence[torch.Tensor], codebook: str, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Decode the weight from its stored tensors.

    Args:
        weight: the tensors that the codebook stores, in the order of `Codebook.tensors`, or packed (see `packing`).
        codebook: its name.
        rows, columns: m and n; the rest of a row's last block is dropped.
        dtype: of the result.

    Returns:
        Ŵ [rows, columns].

    Raises:
        ValueError: the tensors do not fit such a weight.
    """
    book = codebooks.get(codebook)
    return book.decode(named(packing.stored(weight, codebook, columns), book, rows, columns), columns, dtype).contiguous()


def linear(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    """y = sv ⊙ Q_out( Ŵ · Q_inᵀ( su ⊙ x ) ) + bias (QuIP#, arXiv 2402.04396, algorithm 2).

    Args:
        x: floating point [..., n].
        arguments: the fields of a [`Layer`].

    Returns:
        [..., m] in the dtype of x, computed in [`compute_dtype`].
    """
    layer, dtype = Layer(*arguments), compute_dtype(x.dtype)
    weight = decode(layer.weight, layer.codebook, layer.m, layer.n, dtype)
    return linear_formula(x, layer, weight, transform)


def linear_formula(
    x: torch.Tensor, layer: Layer, weight: torch.Tensor, transform: Callable[..., torch.Tensor] = transform_formula
) -> torch.Tensor:
    """[`linear`] with the decoded weight Ŵ [m, n]; with the default `transform`, PyTorch can differentiate all of it."""
    return output(rotated(x, layer, transform), layer, weight, transform).to(x.dtype)


def rotated(x: torch.Tensor, layer: Layer, transform: Callable[..., torch.Tensor]) -> torch.Tensor:
    """Q_inᵀ( su ⊙ x ) in [`compute_dtype`]."""
    dtype = compute_dtype(x.dtype)
    return transform(x.to(dtype) * layer.su.to(dtype), layer.incoherence_in, layer.seed, True)


def output(t: torch.Tensor, layer: Layer, weight: torch.Tensor, transform: Callable[..., torch.Tensor]) -> torch.Tensor:
    """sv ⊙ Q_out( Ŵ t ) + bias in the dtype of t."""
    z = torch.nn.functional.linear(t, weight)
    y = transform(z, layer.incoherence_out, layer.seed, False) * layer.sv.to(t.dtype)
    return y if layer.bias is None else y + layer.bias.to(t.dtype)


def register() -> None:
    """Make these the implementation on every device without one of its own."""
    for function in (transform, decode, linear):
        torch.library.impl(f"quip::{function.__name__}", "default", function)
