"""Which implementation encodes weights on a device; `ops` chooses it, as it chooses the one that computes layers."""

from __future__ import annotations

from collections.abc import Callable

import torch


def _by_type(device: torch.device) -> str:
    return device.type


_chosen: Callable[[torch.device], str] = _by_type


def encode_with(implementation: Callable[[torch.device], str]) -> None:
    """Choose the encoders by device: "cpu", the compiled library, "triton", or another name for PyTorch.

    Until this is called, the compiled library encodes what is on the CPU.
    """
    global _chosen
    _chosen = implementation


def encoder(device: torch.device) -> str:
    """The name of the encoders for tensors on this device, see [`encode_with`]."""
    return _chosen(device)
