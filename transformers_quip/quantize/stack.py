"""The weights of one projection of all experts of a mixture: each is quantized like a linear of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from .layer import QuantizedWeight, quantize_weight, quantize_weights

if TYPE_CHECKING:
    from ..config import QuipConfig


@dataclass
class QuantizedStack:
    """The replacement of weights W [experts, m, n]: a [`QuantizedWeight`] for each expert, stacked on dimension 0.

    Attributes:
        tensors: the codebook's by name, [experts, …].
        su: float32 [experts, n].
        sv: float32 [experts, m].
        statistics: "relative_error", the mean over the experts; "experts", their number.
    """

    tensors: dict[str, torch.Tensor]
    su: torch.Tensor
    sv: torch.Tensor
    statistics: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, experts: Sequence[QuantizedWeight]) -> QuantizedStack:
        """The stack of these experts."""
        tensors = {name: torch.stack([one.tensors[name] for one in experts]) for name in experts[0].tensors}
        errors = [one.statistics["relative_error"] for one in experts if math.isfinite(one.statistics["relative_error"])]
        mean = sum(errors) / len(errors) if errors else math.nan
        statistics = {"relative_error": mean, "experts": len(experts)}
        return cls(tensors, torch.stack([e.su for e in experts]), torch.stack([e.sv for e in experts]), statistics)


def quantize_stack(weights: torch.Tensor, config: QuipConfig, name: str) -> QuantizedStack:
    """Quantize the weights of all experts without calibration.

    Args:
        weights: float [experts, m, n].
        config: see [`quantize_weight`].
        name: of the projection, for errors.

    Raises:
        ValueError: see [`quantize_weight`]; the message names the projection and the expert.
    """
    return QuantizedStack.of([quantize_weight(w, config, f"{name}[{e}]") for e, w in enumerate(weights)])


def quantize_expert(weight: torch.Tensor, hessian: torch.Tensor, config: QuipConfig, name: str) -> QuantizedWeight:
    """Quantize the weight of one expert with the Hessian of its input; arguments are those of [`quantize_weights`]."""
    return quantize_weights({name: weight}, hessian, config)[name]
