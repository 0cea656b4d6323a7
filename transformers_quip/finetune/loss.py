"""The loss of tuning end to end over some windows, and the order in which windows are read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .head import Head, divergence_sum, hidden_states
from .teacher import Teacher

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def divergence_of(
    model: PreTrainedModel, teacher: Teacher, head: Head, chosen: list[int], reverse: float = 0.0
) -> torch.Tensor:
    """Σ over the tokens of these windows of the loss of [`divergence_sum`], with a graph."""
    hidden = hidden_states(model, teacher.ids[chosen].to(model.device)).flatten(0, 1)
    states = teacher.states[chosen].flatten(0, 1).to(hidden)
    return divergence_sum(hidden, states, head, teacher.head(), reverse)


def window_order(count: int, reads: int, seed: int) -> list[int]:
    """Numbers of windows in the order in which they are read: one permutation after the other."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < reads:
        order += torch.randperm(count, generator=generator).tolist()
    return order[:reads]
