"""Scratch memory, which each thread keeps from one call on the CPU to the next."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch

# Most bytes of one piece of scratch memory.
MOST_SCRATCH = 1 << 24

_kept = threading.local()


def scratch(name: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Memory for a result that only this thread needs and only until it asks for this name again.

    The system provides fresh memory page by page, which took as long as a whole matrix product. So each thread keeps
    one piece of up to `MOST_SCRATCH` bytes for each name.
    """
    count = math.prod(shape)
    if count * dtype.itemsize > MOST_SCRATCH:
        return torch.empty(shape, dtype=dtype)
    memory = getattr(_kept, "memory", None)
    if memory is None:
        memory = _kept.memory = {}
    found = memory.get((name, dtype))
    if found is None or found.numel() < count:
        found = memory[name, dtype] = torch.empty(count, dtype=dtype)
    return found[:count].view(shape)
