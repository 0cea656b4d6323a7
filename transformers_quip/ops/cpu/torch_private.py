"""All private functions of PyTorch that this package uses, and a check that they exist and work as expected.

The fast path on the CPU does not go through PyTorch's dispatcher, so it must know whether anybody records operations.
PyTorch has no public function for most of these questions. Each one is asked once when this module is imported, inside a
recorder and outside; if one is missing or answers wrongly, `is_usable()` is False and every call goes through the
dispatcher, which is slower and needs none of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode

logger = logging.getLogger(__name__)


class _Private:
    """The functions, looked up by name; `AttributeError` if this version of PyTorch lacks one."""

    __slots__ = ("below_autograd", "dispatch_modes", "function_mode", "function_modes", "functorch", "profiles", "traces")

    def __init__(self) -> None:
        c = torch._C
        self.dispatch_modes: Callable[[], int] = c._len_torch_dispatch_stack
        self.function_modes: Callable[[], int] = c._len_torch_function_stack
        self.function_mode: Callable[[int], Any] = c._get_function_stack_at
        self.functorch: Callable[[], Any] = c._functorch.peek_interpreter_stack
        self.traces: Callable[[], Any] = c._get_tracing_state
        self.profiles: Callable[[], bool] = torch.autograd._profiler_enabled
        self.below_autograd: Callable[[], AbstractContextManager[Any]] = c._AutoDispatchBelowAutograd
        _ = forward_ad._current_level

    def is_recorded(self) -> bool:
        """See [`is_recorded`]."""
        return (
            (self.function_modes() > 0 and self._has_function_mode())
            or self.dispatch_modes() > 0
            or self.functorch() is not None
            or self.traces() is not None
            or forward_ad._current_level >= 0
        )

    def _has_function_mode(self) -> bool:
        """Whether a mode is active, except `torch.set_default_device`'s, which only decides where new tensors are made."""
        return any(type(self.function_mode(i)) is not DeviceContext for i in range(self.function_modes()))

    def check(self) -> None:
        """Raises `RuntimeError` if an answer is wrong."""
        if self.is_recorded() or self.profiles():
            # Imported during a recording: the answers may be right, but they cannot be compared.
            raise RuntimeError("an operation is being recorded while transformers_quip is imported")
        for recorder in (TorchDispatchMode, TorchFunctionMode, forward_ad.dual_level):
            with recorder():
                if not self.is_recorded():
                    raise RuntimeError(f"{recorder.__name__} is not seen")
        found: list[bool] = []

        def ask(x: torch.Tensor) -> torch.Tensor:
            found.append(self.is_recorded())
            return x

        torch.func.vmap(ask)(torch.zeros(1))
        if not all(found):
            raise RuntimeError("torch.func.vmap is not seen")
        with self.below_autograd():
            pass


def _load() -> _Private | None:
    try:
        private = _Private()
        private.check()
    except Exception as error:  # a later PyTorch may raise anything; the dispatcher is the fallback
        logger.warning(
            "PyTorch %s is not as expected (%s: %s): quantized layers on the CPU are called through its dispatcher, "
            "which is slower for small batches",
            torch.__version__,
            type(error).__name__,
            error,
        )
        return None
    return private


_private = _load()


def is_usable() -> bool:
    """Whether this version of PyTorch answers all questions; if not, nothing may bypass its dispatcher."""
    return _private is not None


def is_recorded() -> bool:
    """Whether something observes or transforms each operation, or may do so.

    That is: a dispatch mode, a function mode, a function transform (vmap, grad, jvp), torch.jit.trace, or forward-mode
    differentiation. True if this cannot be known. The profiler is not included ([`is_watched`]).
    """
    return _private is None or _private.is_recorded()


def is_watched() -> bool:
    """Whether operations are recorded ([`is_recorded`]) or profiled, so that they have to go through the dispatcher."""
    return _private is None or _private.is_recorded() or _private.profiles()


def may_be_dual() -> bool:
    """Whether tensors can have tangents now, because a level of forward-mode differentiation is open."""
    return _private is None or forward_ad._current_level >= 0


def is_transformed() -> bool:
    """Whether a function transform (torch.func) is at work; False if this cannot be known."""
    return _private is not None and _private.functorch() is not None


# Inside it, ops build no graph for derivatives; without effect if this PyTorch does not have it.
below_autograd: Callable[[], AbstractContextManager[Any]] = nullcontext if _private is None else _private.below_autograd


def graph_modes() -> tuple[type, type] | None:
    """The dispatch modes in which AOTAutograd replaces writes and records its graph; None if this PyTorch lacks one."""
    try:
        from torch._subclasses.functional_tensor import FunctionalTensorMode
        from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
    except ImportError:
        return None
    return FunctionalTensorMode, ProxyTorchDispatchMode
