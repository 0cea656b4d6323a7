"""What each thread keeps from one call on the CPU to the next: memory to work with, and the last rotated inputs."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch

# Bytes of one piece of memory that is kept.
MOST_SCRATCH = 1 << 24

_kept = threading.local()


def scratch(name: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Memory for a result that only this thread needs and only until it asks for this name again.

    The system hands fresh memory out page by page, which took as long as a whole matrix product. So each thread keeps
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


class _Rotated(NamedTuple):
    """Rotated inputs that were computed last, and from what."""

    x: weakref.ref
    su: weakref.ref
    versions: tuple[int, int]
    transform: object
    t: torch.Tensor


def rotated(
    x: torch.Tensor, su: torch.Tensor, transform_in: object, shape: Sequence[int], dtype: torch.dtype
) -> torch.Tensor | None:
    """Q_inᵀ( su ⊙ x ) in this form, if that of the same x and an equal su was computed last; else None.

    So it is computed once for linears that read one input (q, k and v; gate and up), which are given equal su when they
    are quantized. For few vectors, where it is a part of the library's call, the saving would be less than a call.
    """
    last: _Rotated | None = getattr(_kept, "rotated", None) if _is_eager() else None
    alike = last is not None and last.x() is x and last.transform == transform_in
    if alike and (last.t.shape, last.t.dtype) == (shape, dtype):
        before = last.su()
        if before is not None and last.versions == (x._version, before._version) and torch.equal(before, su):
            return last.t
    _kept.rotated = None  # its memory is going to be written to
    return None


def keep_rotated(x: torch.Tensor, su: torch.Tensor, transform_in: object, t: torch.Tensor) -> None:
    """Keep what [`rotated`] has not found, and was computed, for calls that follow."""
    # Tensors of inference mode do not tell whether they changed, nor do those into which compiled code writes.
    if _is_eager() and not (x.is_inference() or su.is_inference()):
        _kept.rotated = _Rotated(weakref.ref(x, _forget), weakref.ref(su), (x._version, su._version), transform_in, t)


def _forget(_: weakref.ref) -> None:
    _kept.rotated = None


def _is_eager() -> bool:
    return getattr(_kept, "eager", False)


def set_eager(eager: bool) -> None:
    """Whether the calls from now on are made by no compiled code: the input of one may be that of the one before."""
    _kept.eager = eager
