"""Activation checkpointing: decoder blocks are computed again in the backward pass, instead of keeping activations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def recomputed(blocks: nn.ModuleList | None) -> Iterator[None]:
    """A context in which only the inputs of each of these blocks are kept for the backward pass; None: of no block.

    Transformers' own checkpointing works in training mode alone, in which dropout is on as well.
    """
    before = [] if blocks is None else [(block, block.__dict__.get("forward"), block.forward) for block in blocks]

    def wrapped(forward: Any) -> Any:
        def run(*arguments: Any, **keywords: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*arguments, **keywords)
            return checkpoint(forward, *arguments, use_reentrant=False, **keywords)

        return run

    try:
        for block, _, forward in before:
            block.forward = wrapped(forward)
        yield
    finally:
        for block, own, _ in before:
            del block.forward
            if own is not None:  # accelerate keeps its hook there
                block.forward = own
