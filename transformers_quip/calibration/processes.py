"""Several processes, as torchrun or `accelerate launch` start them: who they are, and what they tell each other."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

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
    return PartialState(cpu=is_on("ACCELERATE_USE_CPU") or not torch.accelerator.is_available(), timeout=_PATIENCE)


def is_on(variable: str) -> bool:
    """Whether a variable of the environment says yes."""
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes")


def count() -> int:
    """The number of processes that work together."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return distributed.get_rank() if count() > 1 else 0


def is_first() -> bool:
    """Whether this process is the one that writes files and shows bars."""
    return rank() == 0


def mine(items: Sequence[_T]) -> list[_T]:
    """The part of this process. All parts are equally long; the last item is repeated if they do not divide evenly."""
    each = -(-len(items) // count())
    begin = each * rank()
    return [items[min(number, len(items) - 1)] for number in range(begin, begin + each)]


def joined(part: torch.Tensor, size: int) -> torch.Tensor:
    """The results [size] of all processes in the order of their items, from those of the parts that [`mine`] gave."""
    if count() == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(count())]
    distributed.all_gather(parts, part)
    return torch.cat(parts)[:size]


def gathered(value: _T) -> list[_T]:
    """The value of every process, in their order. Values are pickled, and must come from this program alone."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    distributed.all_gather_object(values, value)
    return values


def add_up(tensors: Sequence[torch.Tensor]) -> None:
    """Add each of these tensors up over all processes, in place; they have one dtype and device."""
    if count() == 1:
        return
    whole = torch.cat([tensor.reshape(-1) for tensor in tensors])
    distributed.all_reduce(whole)
    for tensor, total in zip(tensors, whole.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))


def add_up_everywhere(tensor: torch.Tensor) -> None:
    """Add a tensor up over all processes, in place in each of them."""
    if count() > 1:
        distributed.all_reduce(tensor)


def add_up_on(process: int, tensor: torch.Tensor) -> None:
    """Add a tensor up over all processes, in place in one of them; in the others its values are lost."""
    if count() > 1:
        distributed.reduce(tensor, dst=process)


def dealt(costs: Mapping[str, float]) -> dict[str, int]:
    """Deal items to the processes so that the largest sum of costs is small: name → process, the same in all of them.

    The costliest item goes first, always to the process with the least so far (Graham's longest processing time).
    """
    sums, result = [0.0] * count(), {}
    for name, cost in sorted(costs.items(), key=lambda item: (-item[1], item[0])):
        result[name] = sums.index(min(sums))
        sums[result[name]] += cost
    return result


def from_first(make: Callable[[], _T]) -> _T:
    """The result of this function in the first process; the others do not call it."""
    values: list[Any] = [make() if is_first() else None]
    if count() > 1:
        distributed.broadcast_object_list(values, 0)
    return values[0]


def first_before_others(make: Callable[[], _T]) -> _T:
    """The result of this function in each process; the first is through before the others begin, and leaves files."""
    result = make() if is_first() else None
    wait()
    return make() if result is None else result


def wait() -> None:
    """Wait until all processes are here."""
    if count() > 1:
        distributed.barrier()
