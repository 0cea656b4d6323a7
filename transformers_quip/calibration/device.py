"""The device on which a model computes, moving its inputs there, and its training mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


def is_linear(module: nn.Module) -> bool:
    """Whether this is an `nn.Linear`, of any subclass, or Transformers' `Conv1D`."""
    return isinstance(module, (nn.Linear, Conv1D))


def execution_device(module: nn.Module) -> torch.device:
    """The device the module computes on: its accelerate hook's, else its first tensor's, else the CPU.

    Offloaded weights are on the meta device between calls. accelerate's hook, on the module or on one inside it, knows
    the device they are loaded to.
    """
    for inner in module.modules():
        hook = getattr(inner, "_hf_hook", None)
        for part in getattr(hook, "hooks", (hook,)):  # a SequentialHook holds several
            device = getattr(part, "execution_device", None)
            if device is not None:
                return torch.device(device)
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.device.type != "meta":
            return tensor.device
    return torch.device("cpu")


def move(value: Any, device: torch.device) -> Any:
    """`value` with every tensor in it (in tuples, lists, dicts) on `device`; no copy where it is there already."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if type(value) in (tuple, list):
        return type(value)(move(item, device) for item in value)
    if type(value) is dict:
        return {key: move(item, device) for key, item in value.items()}
    return value


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Run in eval mode (no dropout), and restore every module's training flag afterwards."""
    training = [inner for inner in module.modules() if inner.training]
    try:
        for inner in training:
            inner.training = False
        yield
    finally:
        for inner in training:
            inner.training = True
