"""Memory of tuning end to end: how much it will take, and how to take less of it for more time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..calibration.recorder import replaced_forwards
from ..memory import free_memory
from ..nn import QuipLinear
from .product import product_dtype
from .student import Student

# Share of the free memory that may be filled before weights and activations are computed again in each pass.
_SHARE = 0.7
# Adam's two moments, the gradient, the best state and the multiplier itself: float32 numbers for each trained one.
_NUMBERS = 5


@dataclass(frozen=True)
class Estimate:
    """Bytes that tuning takes in addition to the quantized model.

    Attributes:
        weights: the decoded weights, if all are kept.
        largest: the largest decoded weight, in float32.
        activations: bytes that the backward pass of one step needs.
        block: the largest share of these of one block: with recomputing, no more than this and the inputs of the blocks.
        inputs: the inputs of all blocks in one step.
        state: of the trained numbers and their optimizer.
        logits: those that exist at one time.
    """

    weights: int
    largest: int
    activations: int
    block: int
    inputs: int
    state: int
    logits: int

    def total(self, keep: bool, recompute: bool) -> int:
        """Bytes, with the decoded weights kept or not, and the activations recomputed or not."""
        weights = self.weights if keep else self.largest
        return weights + (self.block + self.inputs if recompute else self.activations) + self.state + self.logits


def estimate(
    blocks: Sequence[nn.Module], student: Student, run: Callable[[], Any], tokens: tuple[int, int], logits: int
) -> Estimate:
    """The memory and time of a step, from those of a short one.

    Args:
        blocks: the decoder blocks.
        student: the model's trained parts.
        run: a forward pass of a few tokens, with a graph.
        tokens: in `run`, and in a step.
        logits: bytes of the logits that exist at one time.
    """
    counted: dict[int, tuple[int, int]] = {}
    inputs, current = 0, [-1]

    def note(number: int) -> Callable[..., None]:
        def entering(_: nn.Module, arguments: tuple, keywords: dict) -> None:
            nonlocal inputs
            current[0] = number
            inputs += next(x for x in (*arguments, *keywords.values()) if isinstance(x, torch.Tensor)).nbytes

        return entering

    def pack(x: torch.Tensor) -> torch.Tensor:
        counted.setdefault(x.untyped_storage().data_ptr(), (current[0], x.untyped_storage().nbytes()))
        return x

    weights = {p.untyped_storage().data_ptr() for linear in student.linears.values() for p in linear.parameters()}
    hooks = [block.register_forward_pre_hook(note(number), with_kwargs=True) for number, block in enumerate(blocks)]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), torch.enable_grad():
            held = run()  # keeps every counted tensor alive, so that no two have one address
        del held
    finally:
        for hook in hooks:
            hook.remove()
    each = [0] * len(blocks)
    for pointer, (number, size) in counted.items():
        if number >= 0 and pointer not in weights:
            each[number] += size
    factor = tokens[1] / tokens[0]
    return Estimate(
        weights=decoded_bytes(linear.base_layer for linear in student.linears.values()),
        largest=4 * max(linear.in_features * linear.out_features for linear in student.linears.values()),
        activations=round(sum(each) * factor),
        block=round(max(each) * factor),
        inputs=round(inputs * factor),
        state=_NUMBERS * 4 * sum(parameter.numel() for parameter in student.trained().values()),
        logits=logits,
    )


def decoded_bytes(linears: Iterable[QuipLinear]) -> int:
    """Bytes of the decoded weights of all these linears."""
    return sum(linear.in_features * linear.out_features * product_dtype(linear.su.device).itemsize for linear in linears)


def fits(size: int, device: torch.device) -> bool:
    """Whether this number of bytes leaves enough of the device's free memory to others."""
    return size <= _SHARE * free_memory(device)


def blocks_of(model: nn.Module, names: Iterable[str]) -> list[nn.Module]:
    """The members of the outermost list that holds most of the modules with these names; the model itself without one."""
    lists: dict[str, int] = {}
    for name in names:
        parts = name.split(".")
        for end in range(1, len(parts)):
            outer = ".".join(parts[:end])
            if isinstance(model.get_submodule(outer), nn.ModuleList):
                lists[outer] = lists.get(outer, 0) + 1
                break
    if not lists:
        return [model]
    return list(model.get_submodule(max(lists, key=lambda name: lists[name])).children())


@contextmanager
def recomputed(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """A context in which each block computes its activations again in the backward pass, instead of keeping them."""
    with replaced_forwards(blocks, lambda _, block: _again(block.forward)):
        yield


def _again(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def recomputing(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return recomputing
