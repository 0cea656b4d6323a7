"""Descriptions of layers for the CPU library, kept: to make and check one takes longer than to compute a small layer."""

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

    A description holds only what is in its key, so one is right for all tensors that have the same key: their addresses,
    shapes and types. Addresses of different devices differ.

    Args:
        names: all else that decides what is in it, hashable; objects whose addresses are in it are kept alive by the key.
        tensors: all contiguous.
        make: checks the tensors, and describes them.
    """
    key = (names, *(None if v is None else (v.data_ptr(), v.shape, v.dtype) for v in tensors))
    found = _layers.get(key)
    if found is None:
        made = make()
        if len(_layers) >= _MOST_LAYERS:
            _layers.clear()
        found = _layers[key] = (made, ctypes.addressof(made))
    return found
