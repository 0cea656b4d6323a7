"""Properties of the device that every launch needs."""

from __future__ import annotations

import contextlib
import functools
import os

import torch
import triton.language as tl


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU (TRITON_INTERPRET=1 before Triton is imported)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def arch() -> str:
    """The instruction set that kernels with inline assembly are specialised for: "cuda", "hip" or "plain"."""
    if interpreted() or not torch.cuda.is_available():
        return "plain"
    return "hip" if torch.version.hip else "cuda"


@functools.lru_cache(maxsize=16)
def family(device: torch.device) -> str:
    """The family of a device, by which tiles are chosen: "cuda", "blackwell" (its tensor cores are programmed in another
    way), "cdna" (AMD, waves of 64), "rdna" (AMD, waves of 32) or "plain"."""
    if device.type != "cuda":
        return "plain"
    if torch.version.hip:
        return "cdna" if torch.cuda.get_device_properties(device).warp_size == 64 else "rdna"
    return "blackwell" if torch.cuda.get_device_capability(device)[0] >= 10 else "cuda"


def term_dtype() -> tl.dtype:
    """The 16-bit dtype of `dot.dot_signs`: bfloat16 has the range of float32, but the interpreter cannot multiply it."""
    return tl.float16 if interpreted() else tl.bfloat16


@functools.lru_cache(maxsize=16)
def processors(device: torch.device) -> int:
    """Multiprocessors (compute units, Xe cores) of a device: the number of programs that fill it once."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    if device.type == "xpu":
        return torch.xpu.get_device_properties(device).gpu_subslice_count
    return 4


def device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Make the tensor's device the current one: Triton launches there, whatever the device of its arguments is."""
    return current(tensor.device)


def current(device: torch.device) -> contextlib.AbstractContextManager:
    """Make this the current device."""
    if device.type == "cuda":
        return torch.cuda.device(device)
    if device.type == "xpu":
        return torch.xpu.device(device)
    return contextlib.nullcontext()
