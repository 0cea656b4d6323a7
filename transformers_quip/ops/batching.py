"""The ops under torch.func.vmap: one call for all inputs if they share the layer."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree


def linear(info: Any, in_dims: tuple, x: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, int]:
    """quip::linear for every entry of a batch dimension; a loop if tensors of the layer have one too."""
    return _of_one_layer(torch.ops.quip.linear, info, in_dims, x, *arguments)


def bundle(info: Any, in_dims: tuple, x: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, int]:
    """quip::bundle for every entry of a batch dimension; see [`linear`]."""
    return _of_one_layer(torch.ops.quip.bundle, info, in_dims, x, *arguments)


def _of_one_layer(op: Any, info: Any, in_dims: tuple, x: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, int]:
    x_dim, *others = in_dims
    if x_dim is None or any(dim is not None for dim in pytree.tree_leaves(others)):
        return _loop(op, info, in_dims, (x, *arguments))
    return op(x.movedim(x_dim, 0), *arguments), 0


def decode(info: Any, in_dims: tuple, *arguments: Any) -> tuple[torch.Tensor, int]:
    """quip::decode for every entry of a batch dimension."""
    return _loop(torch.ops.quip.decode, info, in_dims, arguments)


def transform(info: Any, in_dims: tuple, x: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, int]:
    """quip::transform for every entry of a batch dimension."""
    return torch.ops.quip.transform(x.movedim(in_dims[0], 0), *arguments), 0


def grouped_linear(info: Any, in_dims: tuple, *arguments: Any) -> tuple[torch.Tensor, int]:
    """quip::grouped_linear for every entry of a batch dimension: each has its own order of tokens."""
    return _loop(torch.ops.quip.grouped_linear, info, in_dims, arguments)


def _loop(op: Any, info: Any, in_dims: tuple, arguments: tuple) -> tuple[torch.Tensor, int]:
    def entry(value: Any, dim: Any, i: int) -> Any:
        if isinstance(value, (list, tuple)):
            dims = dim if isinstance(dim, (list, tuple)) else [dim] * len(value)
            return [entry(v, d, i) for v, d in zip(value, dims, strict=True)]
        return value if dim is None else value.select(dim, i)

    return torch.stack(
        [op(*(entry(v, d, i) for v, d in zip(arguments, in_dims, strict=True))) for i in range(info.batch_size)]
    ), 0


def register() -> None:
    """Register the batching rules."""
    for function in (transform, decode, linear, bundle, grouped_linear):
        torch.library.register_vmap(f"quip::{function.__name__}", function)
