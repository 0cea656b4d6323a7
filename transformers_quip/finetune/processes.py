"""Tuning in several processes, as torchrun or `accelerate launch` start them: each reads a part of every batch.

Only vectors are trained, so every process has all of them, and their gradients are added up. The frozen weights, which are
large, may be sharded (FSDP2).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed, nn

from .student import Student

_T = TypeVar("_T")
# While the first process writes text and reads it with the dense model, the others wait.
_PATIENCE = timedelta(hours=24)


def join() -> Any:
    """Join the processes that this one was started with, if there are several, and choose a device.

    Returns:
        accelerate's `PartialState`; None for a process that was started alone.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    from accelerate import PartialState

    # accelerate joins processes on a CPU only if it is told that they are
    return PartialState(cpu=_is_on("ACCELERATE_USE_CPU") or not torch.accelerator.is_available(), timeout=_PATIENCE)


def wants_sharding() -> bool:
    """Whether `accelerate launch --use_fsdp` has started this process."""
    return _is_on("ACCELERATE_USE_FSDP")


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes")


def count() -> int:
    """The number of processes that tune together."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def is_first() -> bool:
    """Whether this process is the one that writes files and shows bars."""
    return count() == 1 or distributed.get_rank() == 0


def mine(items: Sequence[_T]) -> list[_T]:
    """The part of this process. All parts are equally long; the last item is repeated if they do not divide evenly."""
    each = -(-len(items) // count())
    begin = each * distributed.get_rank() if count() > 1 else 0
    return [items[min(number, len(items) - 1)] for number in range(begin, begin + each)]


def joined(part: torch.Tensor, size: int) -> torch.Tensor:
    """The results [size] of all processes in the order of their items, from those of the parts that [`mine`] gave."""
    if count() == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(count())]
    distributed.all_gather(parts, part)
    return torch.cat(parts)[:size]


def add_up(tensors: Sequence[torch.Tensor]) -> None:
    """Add each of these tensors up over all processes, in place; they have one dtype and device."""
    if count() == 1:
        return
    whole = torch.cat([tensor.reshape(-1) for tensor in tensors])
    distributed.all_reduce(whole)
    for tensor, total in zip(tensors, whole.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))


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


def from_first(make: Callable[[], _T]) -> _T:
    """The result of this function in the first process; the others do not call it."""
    values: list[Any] = [make() if is_first() else None]
    if count() > 1:
        distributed.broadcast_object_list(values, 0)
    return values[0]


def first_before_others(make: Callable[[], _T]) -> _T:
    """The result of this function in each process; the first is through before the others begin, and leaves files."""
    result = make() if is_first() else None
    if count() > 1:
        distributed.barrier()
    return make() if result is None else result


def shard(student: Student) -> None:
    """Shard the frozen weights of the student's linears over the processes (FSDP2); the trained vectors stay whole.

    Each linear is sharded by itself, because the student's linears are gone after tuning, and the model's modules stay.
    """
    from torch.distributed.fsdp import fully_shard

    trained = set(student.trained().values())
    for linear in student.linears.values():
        whole = {parameter for parameter in linear.parameters() if parameter in trained or parameter.ndim == 1}
        fully_shard(linear, reshard_after_forward=True, ignored_params=whole)
