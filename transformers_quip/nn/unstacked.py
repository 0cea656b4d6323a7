"""Experts with quantized linears of their own, as other packages store them, in the place of Transformers' stacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

# The names of the linears of an expert in checkpoints: gate, up, down.
ROLES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))


class UnstackedExperts(nn.Module):
    """Experts E_i(x) = down_i( gated(gate_i x, up_i x) ), weighted by the router; gated is the model's own gate function.

    Args:
        stacked: Transformers' module, with `gate_up_proj` [experts, 2·inner, hidden], `down_proj` [experts, hidden, inner]
            and `act_fn` or `_apply_gate`. It is kept for its shapes and its gate function, on the meta device.
        experts: for each expert, name → quantized linear; the names are one row of `ROLES`.
    """

    def __init__(self, stacked: Any, experts: Sequence[Mapping[str, nn.Module]]):
        super().__init__()
        self.num_experts = len(experts)
        self.roles = next(names for names in ROLES if set(names) == set(experts[0]))
        for index, linears in enumerate(experts):
            self.add_module(str(index), nn.ModuleDict(linears))
        self._stacked = (stacked,)  # in a tuple it is not a part of this module
        self._is_hf_initialized = True

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """The weighted sum of the experts' outputs.

        Args:
            hidden_states: floating point [tokens, hidden].
            top_k_index: int64 [tokens, k]; a number beyond the last expert means none.
            top_k_weights: floating point [tokens, k].

        Returns:
            [tokens, hidden] in the dtype of `hidden_states`.
        """
        result = torch.zeros_like(hidden_states)
        gate, up, down = self.roles
        for index in top_k_index.unique().tolist():
            if not 0 <= index < self.num_experts:
                continue
            linears = getattr(self, str(index))
            tokens, choice = torch.where(top_k_index == index)
            x = hidden_states[tokens]
            y = linears[down](self._gated(linears[gate](x), linears[up](x)))
            result.index_add_(0, tokens, (y * top_k_weights[tokens, choice, None]).to(result.dtype))
        return result

    def _gated(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        (stacked,) = self._stacked
        if hasattr(stacked, "_apply_gate"):
            return stacked._apply_gate(torch.cat([gate, up], dim=-1))
        return stacked.act_fn(gate) * up

    @torch.no_grad()
    def stack(self, weights: Mapping[str, torch.Tensor]) -> nn.Module:
        """Transformers' module again, with dense weights by the names "0.gate_proj" and so on."""
        (stacked,) = self._stacked
        gate, up, down = self.roles
        each = [str(index) for index in range(self.num_experts)]
        stacked.gate_up_proj = nn.Parameter(
            torch.stack([torch.cat([weights[f"{i}.{gate}"], weights[f"{i}.{up}"]]) for i in each])
        )
        stacked.down_proj = nn.Parameter(torch.stack([weights[f"{i}.{down}"] for i in each]))
        return stacked.train(self.training)


def can_unstack(module: nn.Module) -> bool:
    """Whether this is Transformers' stack of experts in the only form that can have linears of other packages."""
    gate_up, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
    if (
        not isinstance(gate_up, nn.Parameter)
        or not isinstance(down, nn.Parameter)
        or not any(callable(getattr(module, gate, None)) for gate in ("act_fn", "_apply_gate"))
    ):
        return False
    if any(getattr(module, kind, False) for kind in ("is_transposed", "has_bias", "has_post_expert_norm")):
        return False
    (experts, twice, hidden), shape = gate_up.shape, tuple(down.shape)
    return shape == (experts, hidden, twice // 2)


def expert_shape(module: Any, role: str) -> tuple[int, int] | None:
    """(outputs, inputs) of one linear of an expert of a stack, by its name in a checkpoint; None for other names."""
    _, hidden, inner = module.down_proj.shape
    for gate, up, down in ROLES:
        if role in (gate, up):
            return inner, hidden
        if role == down:
            return hidden, inner
    return None
