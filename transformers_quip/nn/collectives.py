"""Send a quantized model from one process to the others: codes are sent as bytes.

Codes are 16-bit integers, which neither Gloo nor NCCL has as a type. DistributedDataParallel broadcasts every parameter
once, at its start, and accelerate's FSDP2 does where one process alone has read the file. A broadcast only copies, so
the bytes of a tensor do as well as its numbers. FullyShardedDataParallel (FSDP1) joins parameters to one tensor of one
type, which codes and scales do not have: it is refused with the ways out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .replace import quantized_modules

# Types that Gloo and NCCL do not have: https://docs.pytorch.org/docs/stable/distributed.html
_UNKNOWN = (torch.int16, torch.uint16)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A view of the same memory as uint8, of a tensor that is contiguous and of a type that back ends do not have.

    All other tensors are returned as they are.
    """
    if tensor.dtype not in _UNKNOWN or not tensor.is_contiguous():
        return tensor
    return tensor.detach().reshape(-1).view(torch.uint8)


def single(original: Callable) -> Callable:
    """A broadcast that takes tensors of every type."""

    def broadcast(tensor: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
        return original(as_bytes(tensor), *arguments, **keywords)

    return broadcast


def coalesced(original: Callable) -> Callable:
    """A broadcast of several tensors that takes every type."""

    def broadcast(group: Any, tensors: Sequence[torch.Tensor], *arguments: Any, **keywords: Any) -> Any:
        return original(group, [as_bytes(tensor) for tensor in tensors], *arguments, **keywords)

    return broadcast


def refusing(original: Callable) -> Callable:
    """The constructor of FSDP1, which says that it cannot join the parameters of quantized modules."""

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

    return __init__
