"""Linears of many experts in one call: the reference of the grouped ops, and how a version for a device computes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from .. import codebooks
from . import reference
from .layer import Layer

# Numbers of decoded weights of all tokens together, up to which each token's weight is decoded for itself.
_MOST_GATHERED = 1 << 27


def linear_by_expert(
    linear: Callable[..., torch.Tensor],
    x: torch.Tensor,
    ends: torch.Tensor,
    weight: Sequence[torch.Tensor],
    su: torch.Tensor,
    sv: torch.Tensor,
    *names: Any,
) -> torch.Tensor:
    """quip::grouped_linear by one call of `linear` for each expert that has tokens; no other expert is read.

    Args:
        linear: as [`reference.linear`].
        x: floating point [tokens, n], sorted by expert.
        ends: integers [experts]: tokens from ends[e−1] to ends[e] belong to expert e. They are read once, in one piece.
        weight: the codebook's tensors, each [experts, …].
        su, sv: [experts, n] and [experts, m].
        names: codebook, incoherence_in, incoherence_out, seed.

    Returns:
        [tokens, m] in the dtype of x; zeros from ends[−1] on.
    """
    y = x.new_empty((x.shape[0], sv.shape[-1]))
    end = 0
    for expert, begin, end in with_tokens(ends.tolist()):
        y[begin:end] = linear(x[begin:end], [w[expert] for w in weight], su[expert], sv[expert], None, *names)
    y[end:] = 0
    return y


def with_tokens(ends: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(expert, begin, end) of each expert that has tokens."""
    begin = 0
    for expert, end in enumerate(ends):
        if end > begin:
            yield expert, begin, end
            begin = end


def grouped_linear(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    """For every token, y = sv_e ⊙ Q_out( Ŵ_e · Q_inᵀ( su_e ⊙ x ) ) with the tensors of its expert e.

    Args:
        x, arguments: see [`linear_by_expert`].
    """
    _, _, su, sv, *_ = arguments
    small = x.shape[0] * su.shape[-1] * sv.shape[-1] <= _MOST_GATHERED
    if x.device.type != "cpu" and small:
        return linear_by_token(x, *arguments)
    return linear_by_expert(reference.linear, x, *arguments)


def linear_by_token(
    x: torch.Tensor,
    ends: torch.Tensor,
    weight: Sequence[torch.Tensor],
    su: torch.Tensor,
    sv: torch.Tensor,
    codebook: str,
    incoherence_in: str,
    incoherence_out: str,
    seed: int,
) -> torch.Tensor:
    """The same by decoding a weight for each token: on a GPU, nothing is read by the host, so that a graph can hold it.

    Args:
        x, …: see [`linear_by_expert`].
    """
    (tokens, columns), (experts, rows), dtype = x.shape, sv.shape, reference.compute_dtype(x.dtype)
    if not tokens:
        return x.new_empty((0, rows))
    chosen = expert_of(ends, tokens)
    own = chosen.clamp(max=experts - 1)
    t = reference.transform(x.to(dtype) * su[own].to(dtype), incoherence_in, seed, True)
    if codebooks.get(codebook).rows_together == 1:
        stored = [tensor[own].flatten(0, 1) for tensor in weight]
        decoded = reference.decode(stored, codebook, tokens * rows, columns, dtype).view(tokens, rows, columns)
    else:  # the tensors of several weights are not those of a taller one
        parts = [[tensor.index_select(0, own[i : i + 1])[0] for tensor in weight] for i in range(tokens)]
        decoded = torch.stack([torch.ops.quip.decode(part, codebook, rows, columns, dtype) for part in parts])
    y = reference.transform(torch.bmm(decoded, t[..., None])[..., 0], incoherence_out, seed, False) * sv[own].to(dtype)
    return torch.where((chosen < experts)[:, None], y, 0).to(x.dtype)


def expert_of(ends: torch.Tensor, tokens: int) -> torch.Tensor:
    """The expert of each sorted token: int64 [tokens]; from ends[−1] on, the number of experts. The host reads nothing."""
    return torch.searchsorted(ends, torch.arange(tokens, device=ends.device, dtype=ends.dtype), right=True)


def grouped_linear_backward(
    grad: torch.Tensor, ends: torch.Tensor, weight: Sequence[torch.Tensor], su: torch.Tensor, sv: torch.Tensor, *names: Any
) -> torch.Tensor:
    """The derivative with respect to x: su_e ⊙ Q_in( Ŵ_eᵀ · Q_outᵀ( sv_e ⊙ grad ) ), computed as `reference` does.

    Args:
        grad: floating point [tokens, m].
        others: see [`linear_by_expert`].
    """
    dtype = reference.compute_dtype(grad.dtype)
    result = grad.new_zeros((grad.shape[0], su.shape[-1]))
    for expert, begin, end in with_tokens(ends.tolist()):
        layer = Layer([w[expert] for w in weight], su[expert], sv[expert], None, *names)
        decoded = torch.ops.quip.decode(layer.weight, layer.codebook, layer.m, layer.n, dtype)
        inner = grad[begin:end].to(dtype) * layer.sv.to(dtype)
        inner = torch.ops.quip.transform(inner, layer.incoherence_out, layer.seed, True) @ decoded
        inner = torch.ops.quip.transform(inner, layer.incoherence_in, layer.seed, False)
        result[begin:end] = inner * layer.su.to(dtype)
    return result


def register() -> None:
    """Make these the implementation on every device without one of its own."""
    for function in (grouped_linear, grouped_linear_backward):
        torch.library.impl(f"quip::{function.__name__}", "default", function)
