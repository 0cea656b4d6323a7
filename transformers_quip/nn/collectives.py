"""Sending a quantized model from one process to the others: codes travel as bytes.

Codes are 16-bit integers, which neither Gloo nor NCCL has as a type. DistributedDataParallel broadcasts every parameter
once, at its start, and accelerate's FSDP2 does where one process alone has read the file. A broadcast only copies, so
the bytes of a tensor do as well as its numbers. FullyShardedDataParallel (FSDP1) joins parameters to one tensor of one
type, which codes and scales do not have: it is refused with the ways out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .replace import quantized_modules

# What Gloo and NCCL do not have: https://docs.pytorch.org/docs/stable/distributed.html
_UNKNOWN = (torch.int16, torch.uint16)
_MARK = "_transformers_quip_original"


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A view of the same memory as uint8, of a tensor that is contiguous and of a type that back ends do not have.

    All other tensors are returned as they are.
    """
    if tensor.dtype not in _UNKNOWN or not tensor.is_contiguous():
        return tensor
    return tensor.detach().reshape(-1).view(torch.uint8)


def install() -> None:
    """Let the broadcasts of `torch.distributed` take tensors of every type, and FSDP1 say that it cannot.

    May be called any number of times.
    """
    if not dist.is_available():
        return
    for module, name in ((dist, "broadcast"), (dist.distributed_c10d, "broadcast"), (dist, "_broadcast_coalesced")):
        original = getattr(module, name, None)
        if original is not None and not hasattr(original, _MARK):
            wrap = _coalesced if name == "_broadcast_coalesced" else _single
            setattr(module, name, wrap(original))
    from torch.distributed.fsdp import FullyShardedDataParallel

    if not hasattr(FullyShardedDataParallel.__init__, _MARK):
        setattr(FullyShardedDataParallel, "__init__", _refusing(FullyShardedDataParallel.__init__))  # noqa: B010


def _single(original: Callable) -> Callable:
    @functools.wraps(original)
    def broadcast(tensor: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
        return original(as_bytes(tensor), *arguments, **keywords)

    setattr(broadcast, _MARK, original)
    return broadcast


def _coalesced(original: Callable) -> Callable:
    def broadcast(group: Any, tensors: Sequence[torch.Tensor], *arguments: Any, **keywords: Any) -> Any:
        return original(group, [as_bytes(tensor) for tensor in tensors], *arguments, **keywords)

    setattr(broadcast, _MARK, original)
    return broadcast


def _refusing(original: Callable) -> Callable:
    @functools.wraps(original)
    def __init__(self: nn.Module, module: nn.Module, *arguments: Any, **keywords: Any) -> None:
        ignores = keywords.get("ignored_states") is not None or keywords.get("ignored_modules") is not None
        names = [] if ignores else list(quantized_modules(module))
        if names:
            raise ValueError(
                f"FullyShardedDataParallel (FSDP1) joins all parameters to one tensor of one type, and a quantized module "
                f"({names[0] or type(module).__name__}) has integers and floats. Use FSDP2 (torch.distributed.fsdp."
                "fully_shard; `fsdp_version: 2` of accelerate) or DistributedDataParallel"
            )
        original(self, module, *arguments, **keywords)

    setattr(__init__, _MARK, original)
    return __init__
