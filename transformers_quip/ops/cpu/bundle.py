"""Linears that read one input, on the CPU."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch

from ..bundle import layers_of, rotation
from . import run
from .codes import codes_of
from .route import Route


def bundle(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    """See [`bundle.bundle`].

    Many vectors are rotated once. For few of them each linear is one call of the library, which rotates them itself: one
    more call takes longer than that.
    """
    layers = [run.with_stored_codes(layer) for layer in layers_of(*arguments)]
    vectors = x.numel() // layers[0].n
    y = x.new_empty((*x.shape[:-1], sum(layer.m for layer in layers)))
    known: Hashable = None
    rotated, begin = x, 0
    for layer in layers:
        plan = run.plan(x.dtype, layer)
        end, way = begin + layer.m, plan.routes.of(vectors)
        if way is Route.DECODED:
            wanted = rotation(layer)
            if wanted != known:
                known, rotated = wanted, run.rotated(x, layer, plan.q_in)
            part = run.decoded(rotated, layer, codes_of(layer, plan.case.planes), plan.q_out, x.dtype)
            y[..., begin:end] = part.view(*x.shape[:-1], layer.m)
        else:
            known = None  # it may use the same memory for its rotated inputs
            y[..., begin:end] = run.computed(x, layer, plan, way)
        begin = end
    return y


def register() -> None:
    """Make this the implementation for tensors on the CPU."""
    torch.library.impl("quip::bundle", "cpu", bundle)
