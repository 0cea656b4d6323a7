"""Equal calls of one op in a graph that torch.compile makes: computed once.

Linears that are stored as one matrix (`nn.fused`) call all of it, each with the same arguments. Eager calls find the first
one's result by `same_input`; while a graph is made there are no values to compare. AOTAutograd, which the default backend
of torch.compile and torch.export use, replaces every write by a new tensor before it makes its graph. So in such a graph
two calls of one op with the same arguments give the same result, wherever they are. Other graphs are left alone.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

from .cpu import torch_private
from .schemas import SCHEMAS


class _Call(NamedTuple):
    arguments: list[Any]  # kept alive, so that their ids stay theirs
    result: torch.Tensor


_calls: weakref.WeakKeyDictionary[Any, dict[Hashable, _Call]] = weakref.WeakKeyDictionary()  # by the graph's tracer
_thread = threading.local()


def without_writes(mode: Any, op: Callable, types: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The rule of an op for the mode that replaces writes: equal calls below it may become one.

    Args: see `TorchDispatchMode.__torch_dispatch__`.
    """
    before, _thread.has_no_writes = _has_no_writes(), True
    try:
        return mode.__torch_dispatch__(op, types, args, kwargs)
    finally:
        _thread.has_no_writes = before


def once(mode: Any, op: Callable, types: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The rule of an op for the mode that makes a graph: a copy of the result of an equal call, or a new node.

    Args: see `TorchDispatchMode.__torch_dispatch__`.
    """
    if not _has_no_writes():
        return mode.__torch_dispatch__(op, types, args, kwargs)
    arguments = pytree.tree_leaves((args, kwargs))
    calls = _calls.setdefault(mode.tracer, {})
    key = (op, *(v if isinstance(v, (str, int)) else id(v) for v in arguments))
    known = calls.get(key)
    if known is not None:
        # a copy, as two results of eager calls never share memory; Inductor fuses it with its readers
        return mode.__torch_dispatch__(torch.ops.aten.clone.default, types, (known.result,), {})
    result = mode.__torch_dispatch__(op, types, args, kwargs)
    calls[key] = _Call(arguments, result)
    return result


def _has_no_writes() -> bool:
    return getattr(_thread, "has_no_writes", False)


def register() -> None:
    """Make these the rules of every op of `schemas`, if this version of PyTorch has the modes."""
    modes = torch_private.graph_modes()
    if modes is None:
        return
    for name in SCHEMAS:
        for mode, rule in zip(modes, (without_writes, once), strict=True):
            torch.library.register_torch_dispatch(f"quip::{name}", mode, rule)
