"""Linears that read the same input: its transform is computed once for all of them.

They are told apart by their names, and by equal su, which they are given when they are quantized. That they really read one
input is seen at every call: another tensor, or one that was changed, is transformed anew.

This is for kernels that are launched one by one (GPUs). On the CPU a whole layer is one call into the library, and a second
call for the transform costs more than a small one takes (`benchmarks/shared_input.py`); for many vectors, `ops.cpu` shares.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..ops.backend import get_activations
from .linear import QuipLinear

# What Transformers calls linears of one input, of those that stand in one module.
READ_TOGETHER = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),
)


class SharedInput:
    """The last input of some linears, transformed; kept from the first of them that is called to the last.

    Args:
        shares: how many linears there are.
    """

    def __init__(self, shares: int):
        self.shares = shares
        self._held: tuple[torch.Tensor, int | None, str, list[torch.Tensor], int] | None = None

    def take(self, linear: QuipLinear, x: torch.Tensor) -> list[torch.Tensor]:
        """What `linear.rotate(x)` returns."""
        # Read once: another thread may replace it at any time. The input itself is held, so that `is` cannot mean another
        # tensor at the same address; its version tells that it was not changed in between.
        held, version, activations = self._held, _version(x), get_activations()
        if held is not None and held[0] is x and held[1] == version and held[2] == activations:
            rotated, left = held[3], held[4] - 1
        else:
            rotated, left = linear.rotate(x), self.shares - 1
        self._held = (x, version, activations, rotated, left) if left > 0 and version is not None else None
        return rotated

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_held": None}


def share_inputs(model: nn.Module) -> list[tuple[str, ...]]:
    """Let the quantized linears of a model that read one input share its transform; returns the names of each group.

    To be called again when su have changed: linears whose su were changed or loaded compute for themselves until then.
    """
    groups = []
    for parent_name, parent in model.named_modules():
        children = {name: child for name, child in parent.named_children() if type(child) is QuipLinear}
        for child in children.values():
            child.share_input(None)
        for names in READ_TOGETHER:
            names = [name for name in names if name in children]
            while names:
                first, alike = children[names[0]], [names[0]]
                alike += [name for name in names[1:] if _transforms_alike(first, children[name])]
                if len(alike) > 1:
                    shared = SharedInput(len(alike))
                    for name in alike:
                        children[name].share_input(shared)
                    groups.append(tuple(f"{parent_name}.{name}" if parent_name else name for name in alike))
                names = [name for name in names if name not in alike]
    return groups


def _transforms_alike(first: QuipLinear, second: QuipLinear) -> bool:
    """Whether both do the same to their input."""
    pair: Sequence[QuipLinear] = (first, second)
    if len({(m.in_features, m.codebook, m.incoherence_in, m.seed, m.su.dtype, m.su.device) for m in pair}) > 1:
        return False
    return not first.su.is_meta and torch.equal(first.su, second.su)


def _version(x: torch.Tensor) -> int | None:
    """Tells whether a tensor was changed; None for a tensor of inference mode, which does not count its changes."""
    if torch.compiler.is_compiling():  # a compiler's tensors are not changed behind its back
        return 0
    return None if x.is_inference() else x._version
