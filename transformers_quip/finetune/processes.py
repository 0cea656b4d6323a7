"""Tuning in several processes, as torchrun or `accelerate launch` start them: each reads a part of every batch.

Only vectors are trained, so every process has all of them, and their gradients are added up. The frozen weights, which are
large, may be sharded (FSDP2).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ..calibration.processes import (
    add_up,
    count,
    first_before_others,
    from_first,
    is_first,
    is_on,
    join,
    joined,
    mine,
)
from .student import Student

__all__ = [
    "add_up_gradients",
    "count",
    "first_before_others",
    "from_first",
    "is_first",
    "join",
    "joined",
    "mine",
    "shard",
    "wants_sharding",
]


def wants_sharding() -> bool:
    """Whether `accelerate launch --use_fsdp` has started this process."""
    return is_on("ACCELERATE_USE_FSDP")


def add_up_gradients(parameters: Iterable[nn.Parameter], loss: torch.Tensor) -> torch.Tensor:
    """Add the gradients of these parameters up over all processes, in place. Returns the loss, added up."""
    if count() == 1:
        return loss
    parameters = list(parameters)
    for parameter in parameters:
        if parameter.grad is None:  # another process may have reached it
            parameter.grad = torch.zeros_like(parameter)
    total = loss.detach().to(parameters[0]).reshape(1)
    add_up([*(parameter.grad for parameter in parameters if parameter.grad is not None), total])
    return total


def shard(student: Student) -> None:
    """Shard the frozen weights of the student's linears over the processes (FSDP2); the trained vectors stay whole.

    Each linear is sharded by itself, because the student's linears are gone after tuning, and the model's modules stay.
    """
    from torch.distributed.fsdp import fully_shard

    trained = set(student.trained().values())
    for linear in student.linears.values():
        whole = {parameter for parameter in linear.parameters() if parameter in trained or parameter.ndim == 1}
        fully_shard(linear, reshard_after_forward=True, ignored_params=whole)
