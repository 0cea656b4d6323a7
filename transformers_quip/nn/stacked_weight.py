"""A stack of weights as the forward of a model reads it, for modules of experts that are not computed by a rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from .stacked_forward import StackedForward
    from .stacks import Stack

_MATMUL = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm)


class StackedWeight:
    """Stands for a parameter [experts, a, b]: `weight[e]` and `torch.bmm(x, weight)` work, little else does.

    One that is stored as [experts·a, b] has to be viewed as the former first.

    Args:
        experts: the module that computes the products.
        stack: the projection.
        turned: whether this stands for the transpose of the parameter.
    """

    # Transformers' initialisation, which some models begin at the parent of their experts, leaves such a weight alone.
    _is_hf_initialized = True

    def __init__(self, experts: StackedForward, stack: Stack, turned: bool = False):
        self._experts, self._stack, self._turned = experts, stack, turned
        shape = stack.stored_shape
        self.shape = torch.Size((shape[0], shape[2], shape[1]) if turned else shape)

    def size(self, dim: int | None = None) -> Any:
        """As of a tensor."""
        return self.shape if dim is None else self.shape[dim]

    def __len__(self) -> int:
        return self.shape[0]

    def view(self, *shape: Any) -> StackedWeight:
        """As [experts, a, b]."""
        sizes = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        if sizes[1:] != tuple(self.shape[1:]) or sizes[0] not in (-1, self.shape[0]):
            raise _unreadable(self._stack, f"view{sizes}")
        return self

    reshape = view

    def __getitem__(self, expert: Any) -> _Weight:
        return _Weight(self._experts, self._stack, int(expert), self._turned)

    def transpose(self, a: int, b: int) -> StackedWeight:
        """Each expert's weight transposed."""
        if {a % 3, b % 3} != {1, 2}:
            raise _unreadable(self._stack, "transpose")
        return StackedWeight(self._experts, self._stack, not self._turned)

    @property
    def mT(self) -> StackedWeight:
        """See [`transpose`]."""
        return self.transpose(1, 2)

    def __getattr__(self, name: str) -> Any:
        raise _unreadable(self._stack, name)

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        x, weight = args[0], args[1] if len(args) > 1 else None
        if func is not torch.bmm or not isinstance(weight, StackedWeight) or weight._turned == weight._stack.transposed:
            stack = (weight if isinstance(weight, StackedWeight) else x)._stack
            raise _unreadable(stack, getattr(func, "__name__", str(func)))
        return weight._multiplied(x)

    def _multiplied(self, x: torch.Tensor) -> torch.Tensor:
        """The product of x [experts, tokens, columns]; without tokens of zeros, which were not sent to that expert."""
        experts, tokens, _ = x.shape
        x, name = x.reshape(experts * tokens, -1), self._stack.name
        if torch.compiler.is_compiling():
            ends = torch.arange(1, experts + 1, device=x.device) * tokens
            return self._experts.product(name, x, ends).view(experts, tokens, -1)
        used = x.any(-1)
        y = x.new_zeros((len(x), self._stack.rows))
        y[used] = self._experts.product(name, x[used], used.view(experts, tokens).sum(1).cumsum(0))
        return y.view(experts, tokens, -1)


class _Weight:
    """Stands for the weight of one expert: `functional.linear(x, w)` or `x @ w`, whichever the module does."""

    def __init__(self, experts: StackedForward, stack: Stack, expert: int, turned: bool):
        self._experts, self._stack, self._expert, self._turned = experts, stack, expert, turned

    @property
    def T(self) -> _Weight:
        """The transpose."""
        return _Weight(self._experts, self._stack, self._expert, not self._turned)

    mT = T

    def __getattr__(self, name: str) -> Any:
        raise _unreadable(self._stack, name)

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        x, weight = args[0], args[1] if len(args) > 1 else None
        outputs_first = isinstance(weight, _Weight) and weight._turned == weight._stack.transposed
        if isinstance(weight, _Weight) and (
            (func is functional.linear and outputs_first and len(args) == 2 and not kwargs)
            or (func in _MATMUL and not outputs_first)
        ):
            if x.numel() == 0:
                return x.new_zeros((*x.shape[:-1], weight._stack.rows))
            return weight._experts.single(weight._stack.name, weight._expert, x)
        raise _unreadable((weight if isinstance(weight, _Weight) else x)._stack, getattr(func, "__name__", str(func)))


def _unreadable(stack: Stack, name: str) -> ValueError:
    return ValueError(
        f"{name}: the weights {stack.name} of quantized experts are stored as codes and have no values to read or change: "
        "leave these experts dense (modules_to_not_convert), or call model.dequantize()"
    )
