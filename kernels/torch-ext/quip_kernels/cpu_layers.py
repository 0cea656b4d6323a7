"""Cached descriptions of layers for the CPU library: making and checking one takes longer than computing a small layer."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Description = TypeVar("Description", bound=ctypes.Structure)

_layers: dict[tuple, tuple] = {}
_MOST_LAYERS = 4096


def description(
    make: Callable[..., Description], tensors: tuple[torch.Tensor | None, ...], *names: Any
) -> tuple[Description, int]:
    """The description of a layer, which must be kept as long as it is used, and its address.

    A description depends only on its key, so it is right for all tensors with the same key: their addresses, shapes and
    types. Addresses of different devices differ.

    Args:
        make: checks the tensors and describes them: make(tensors, *names).
        tensors: all contiguous.
        names: everything else that the description depends on, hashable; the key keeps these objects alive.
    """
    key = (*names, *[None if v is None else (v.data_ptr(), v.shape, v.dtype) for v in tensors])  # faster than a generator
    found = _layers.get(key)
    if found is None:
        made = make(tensors, *names)
        if len(_layers) >= _MOST_LAYERS:
            _layers.clear()
        found = _layers[key] = (made, ctypes.addressof(made))
    return found
