"""The ops in plain PyTorch: slow, readable, on every device, and the truth that faster versions are tested against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .. import codebooks
from .. import incoherence as transforms
from . import packing
from .layer import Layer, named

# In the place of a precision of activations: rotated inputs as the reference takes them, on every device.
REFERENCE = "reference"


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
    q = transforms.get(incoherence, x.shape[-1], seed)
    y = x.to(compute_dtype(x.dtype)).contiguous()
    y = (q.apply_transpose(y) if transpose else q.apply(y)).to(x.dtype)
    # An op may not return its input, which the identity transform does.
    return y.clone() if y.data_ptr() == x.data_ptr() else y.contiguous()


def decode(weight: Sequence[torch.Tensor], codebook: str, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """The weight that stored tensors stand for.

    Args:
        weight: the tensors that the codebook stores, in the order of `Codebook.tensors`, or packed (see `packing`).
        codebook: its name.
        rows, columns: the real ones; the rest of a row's last block is dropped.
        dtype: of the result.

    Returns:
        Ŵ [rows, columns].

    Raises:
        ValueError: the tensors are not those of such a weight.
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
    layer = Layer(*arguments)
    return rotated_linear(x, rotate(x, layer.su, layer.codebook, layer.incoherence_in, layer.seed, REFERENCE), *layer)


def rotate(
    x: torch.Tensor, su: torch.Tensor, codebook: str, incoherence: str, seed: int, activations: str
) -> list[torch.Tensor]:
    """The first step of [`linear`]: [Q_inᵀ( su ⊙ x )], one tensor [..., n] in [`compute_dtype`]."""
    dtype = compute_dtype(x.dtype)
    return [transform(x.to(dtype) * su.to(dtype), incoherence, seed, True)]


def rotated_linear(x: torch.Tensor, rotated: list[torch.Tensor], *arguments: Any) -> torch.Tensor:
    """The second step of [`linear`], from the result of [`rotate`]; x itself tells the shape and the dtype."""
    layer, dtype = Layer(*arguments), compute_dtype(x.dtype)
    weight = decode(layer.weight, layer.codebook, layer.m, x.shape[-1], dtype)
    y = torch.nn.functional.linear(rotated[0], weight)
    y = transform(y, layer.incoherence_out, layer.seed, False) * layer.sv.to(dtype)
    if layer.bias is not None:
        y = y + layer.bias.to(dtype)
    return y.to(x.dtype)


def register() -> None:
    """Make these the implementation on every device that has none of its own."""
    for function in (transform, decode, linear, rotate, rotated_linear):
        torch.library.impl(f"quip::{function.__name__}", "default", function)
