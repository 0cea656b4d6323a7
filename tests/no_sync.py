"""Code in which the host may not wait for a device, tried on the CPU: it may not need the values of a tensor."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# The host needs a value of their result, or the size of the result depends on values.
_WAITING = frozenset(
    {
        "aten::_linalg_check_errors",
        "aten::_local_scalar_dense",
        "aten::_unique2",
        "aten::bincount",
        "aten::equal",
        "aten::is_nonzero",
        "aten::item",
        "aten::lift_fresh",  # a tensor of numbers of Python
        "aten::masked_select",
        "aten::nonzero",
        "aten::repeat_interleave",
        "aten::unique_consecutive",
        "aten::unique_dim",
    }
)
_INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
_METHODS = ("tolist", "numpy", "cpu", "__array__")


class _Notice(TorchDispatchMode):
    def __init__(self, waits: Callable[[str], None]):
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.name().partition(".")[0], kwargs or {}
        by_mask = name in _INDEXING and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if by_mask or name in _WAITING:
            self.waits(name)
        device = kwargs.get("device") if name == "aten::_to_copy" else args[1].device if name == "aten::copy_" else None
        if device is not None and torch.device(device).type != args[0].device.type:
            self.waits(f"{name} between {args[0].device} and {device}")
        return func(*args, **kwargs)


@contextlib.contextmanager
def forbidden_synchronisation(noted: list[str] | None = None) -> Iterator[None]:
    """Raise `AssertionError` where the host would wait for a GPU, whatever the device is.

    Triton's interpreter and C libraries work outside of PyTorch's operations, so they are not seen.

    Args:
        noted: gets the names of these operations, and nothing is raised.
    """

    def refuse(*_):
        raise AssertionError("a tensor's values are read by the host")

    def waits(name: str) -> None:
        if noted is None:
            raise AssertionError(f"{name} makes the host wait for the device")
        noted.append(name)

    with contextlib.ExitStack() as stack:
        for method in _METHODS:
            stack.enter_context(mock.patch.object(torch.Tensor, method, refuse))
        stack.enter_context(_Notice(waits))
        yield
