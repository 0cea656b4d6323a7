"""Cached descriptions of layers for the CPU library: making and checking one takes longer than computing a small layer."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TypeVar

import torch

Description = TypeVar("Description", bound=ctypes.Structure)

_layers: dict[tuple, tuple] = {}
_MOST_LAYERS = 4096


def description(
    names: tuple, tensors: tuple[torch.Tensor | None, ...], make: Callable[[], Description]
) -> tuple[Description, int]:
    """The description of a layer, which must be kept as long as it is used, and its address.

    A description depends only on its key, so it is right for all tensors with the same key: their addresses, shapes and
    types. Addresses of different devices differ.

    Args:
        names: everything else that the description depends on, hashable; the key keeps these objects alive.
        tensors: all contiguous.
        make: checks the tensors and describes them.
    """
    key = (names, *(None if v is None else (v.data_ptr(), v.shape, v.dtype) for v in tensors))
    found = _layers.get(key)
    if found is None:
        made = make()
        if len(_layers) >= _MOST_LAYERS:
            _layers.clear()
        found = _layers[key] = (made, ctypes.addressof(made))
    return found
