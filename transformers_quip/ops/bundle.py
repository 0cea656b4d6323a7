"""Linears that read one input, in one call: their outputs follow one another, and the input is rotated once for all."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch

from . import reference
from .layer import Layer, integer_dtypes

T = TypeVar("T")


class Form(NamedTuple):
    """The names in a [`Layer`]: the codebook, the transforms Q_in and Q_out, and their seed."""

    codebook: str
    incoherence_in: str
    incoherence_out: str
    seed: int


def described(forms: Iterable[Form]) -> str:
    """The names of several linears in one text, which a call passes on in half the time of four lists: JSON."""
    return json.dumps([list(form) for form in forms])


@functools.lru_cache(maxsize=4096)
def _forms(linears: str) -> tuple[tuple[Form, int], ...]:
    """The inverse of [`described`], and the number of tensors that each codebook stores."""
    forms = [Form(*names) for names in json.loads(linears)]
    return tuple((form, len(integer_dtypes(form.codebook))) for form in forms)


def layers_of(
    weight: Sequence[torch.Tensor], su: Sequence[torch.Tensor], sv: Sequence[torch.Tensor], linears: str
) -> list[Layer]:
    """The linears of a bundle one by one.

    Args:
        weight: the stored tensors of the first linear, then those of the second, and so on.
        su: [n] of each; sv: [m] of each.
        linears: the names of each ([`described`]).

    Raises:
        ValueError: these lists are of different lengths, or there are more or fewer tensors than the codebooks store.
    """
    forms = _forms(linears)
    if len(forms) != len(su) or len(forms) != len(sv) or sum(count for _, count in forms) != len(weight):
        raise ValueError(
            f"a bundle of {len(forms)} linears needs as many su and sv, and {sum(count for _, count in forms)} tensors of "
            f"weights; it has {len(su)}, {len(sv)} and {len(weight)}"
        )
    layers, begin = [], 0
    for (form, count), own_su, own_sv in zip(forms, su, sv, strict=True):
        layers.append(Layer(weight[begin : begin + count], own_su, own_sv, None, *form))
        begin += count
    return layers


def rotation(layer: Layer) -> Hashable:
    """Equal for linears whose rotated inputs Q_inᵀ( su ⊙ x ) are equal, because their su are the same memory."""
    return layer.su.data_ptr(), layer.su.dtype, layer.incoherence_in, layer.seed


def joined(
    x: torch.Tensor,
    layers: Iterable[Layer],
    key: Callable[[Layer], Hashable],
    rotate: Callable[[Layer], T],
    product: Callable[[T, Layer], torch.Tensor],
) -> torch.Tensor:
    """The outputs of all linears, [..., Σ m]; neighbours with the same key get one rotated input.

    Args:
        x: [..., n]. key: see [`rotation`].
        rotate: the rotated input for a linear. product: the output of a linear for it.
    """
    layers = list(layers)
    y = x.new_empty((*x.shape[:-1], sum(layer.m for layer in layers)))
    known: Hashable = None
    rotated: Any = None
    begin = 0
    for layer in layers:
        wanted = key(layer)
        if wanted != known:
            known, rotated = wanted, rotate(layer)
        y[..., begin : begin + layer.m] = product(rotated, layer)
        begin += layer.m
    return y


def bundle(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    """For each linear in turn, y = sv ⊙ Q_out( Ŵ · Q_inᵀ( su ⊙ x ) ), as [`reference.linear`] computes it.

    Args:
        x: floating point [..., n].
        arguments: see [`layers_of`].

    Returns:
        [..., Σ m] in the dtype of x.
    """

    def product(t: torch.Tensor, layer: Layer) -> torch.Tensor:
        weight = reference.decode(layer.weight, layer.codebook, layer.m, layer.n, t.dtype)
        return reference.output(t, layer, weight, reference.transform)

    return joined(
        x, layers_of(*arguments), rotation, lambda layer: reference.rotated(x, layer, reference.transform), product
    )


def register() -> None:
    """Make this the implementation on every device without one of its own."""
    torch.library.impl("quip::bundle", "default", bundle)
