"""The forward of a module of experts whose products somebody else computes: quantized, or watched by calibration."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from .stacked_weight import StackedWeight
from .stacks import WRITES, find_stacks, is_routed


class StackedForward(nn.Module):
    """Takes the place of a module of experts and computes the same; `product` and `single` have the weights.

    A module that is routed ([`is_routed`]) is computed with its tokens sorted by expert, so that each projection is one
    call. Any other runs its own forward, in which the parameters are [`StackedWeight`]s.

    Args:
        module: of experts. Its other parameters, its buffers and its children become this module's; a copy of it without
            values is kept for its gate function and its attributes.

    Attributes:
        stacks: its projections by name.
        num_experts: their number; expert parallelism sets it to the number of its own.
    """

    def __init__(self, module: Any):
        super().__init__()
        self.stacks = find_stacks(module)
        self.num_experts = min(stack.experts for stack in self.stacks.values())
        for name, parameter in module._parameters.items():
            if name not in self.stacks:
                self.register_parameter(name, parameter)
        for name, buffer in module._buffers.items():
            self.register_buffer(name, buffer, name not in module._non_persistent_buffers_set)
        for name, child in module.named_children():
            self.add_module(name, child)
        self._routed = is_routed(module)
        self._arguments = tuple(inspect.signature(module.forward).parameters)
        self._bare = (_without_values(module, self.stacks),)  # in a tuple it is not a part of this module
        self.train(module.training)
        self._is_hf_initialized = True

    def product(self, name: str, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """The products of sorted tokens with their experts' weights.

        Args:
            name: of the projection.
            x: [tokens, columns]; those from ends[e−1] to ends[e] belong to expert e.
            ends: int64 [experts], not decreasing.

        Returns:
            [tokens, rows]; zeros from ends[−1] on.
        """
        raise NotImplementedError

    def single(self, name: str, expert: int, x: torch.Tensor) -> torch.Tensor:
        """The product of tokens [..., columns] with one expert's weight: [..., rows]."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own arguments and result."""
        if not self._routed:
            return type(self._bare[0]).forward(self, *args, **kwargs)
        given = (*args, *(kwargs[name] for name in self._arguments[len(args) :]))
        return self._route(*given)

    def _route(self, hidden_states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The weighted sum of the chosen experts' outputs.

        Args:
            hidden_states: floating point [tokens, hidden].
            index: int64 [tokens, k]; a number beyond the last expert means none.
            weights: floating point [tokens, k].

        Returns:
            [tokens, hidden] in the dtype of `hidden_states`.
        """
        tokens, k = index.shape
        chosen, order = index.reshape(-1).sort(stable=True)
        experts = torch.arange(self.num_experts, device=chosen.device, dtype=chosen.dtype)
        ends = torch.searchsorted(chosen, experts, right=True)
        bare, own = self._bare[0], chosen.clamp(max=self.num_experts - 1)
        x = hidden_states[order // k]
        name = next(iter(self.stacks))
        y = self._biased(name, self.product(name, x, ends), own)
        y = bare._apply_gate(y) if name == "gate_up_proj" else bare.act_fn(y)
        y = self._biased(WRITES, self.product(WRITES, y.to(x.dtype), ends), own)
        if getattr(bare, "has_post_expert_norm", False):
            y = self.post_expert_norm(y)
        y = y * weights.reshape(-1)[order, None]
        y = torch.where((chosen < self.num_experts)[:, None], y, 0)
        restored = torch.empty_like(y).index_copy_(0, order, y)
        return restored.view(tokens, k, y.shape[-1]).sum(1).to(hidden_states.dtype)

    def _biased(self, name: str, y: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
        bias = self._parameters.get(f"{name}_bias")
        return y if bias is None else y + bias[expert]

    def __getattr__(self, name: str) -> Any:
        """A projection as the module's own forward reads it, and the attributes of that module."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            stacks, bare = self.__dict__.get("stacks", {}), self.__dict__.get("_bare")
            if name in stacks:
                return StackedWeight(self, stacks[name])
            if bare is None or name.startswith("__"):
                raise
        return getattr(bare[0], name)


def _without_values(module: nn.Module, names: Iterable[str]) -> Any:
    """A copy of a module that has its attributes, its children and, of its parameters, these on the meta device."""
    bare = copy.copy(module)
    bare.__dict__ = dict(module.__dict__)
    kept: Mapping[str, Any] = module._parameters
    bare._parameters = {name: nn.Parameter(kept[name].detach().to("meta"), requires_grad=False) for name in names}
    return bare
