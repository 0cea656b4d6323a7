"""Transformers' plans for several processes, and what quantized modules can follow of them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from ..nn.experts import QuipExperts
from ..nn.replace import quantized_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# The styles of expert parallelism: whole experts in each process.
_SHARDS = "grouped_gemm"
_EXPERT_STYLES = (_SHARDS, "ep_dispatch_experts", "ep_router")


def update_plan(model: PreTrainedModel, plan: dict[str, str] | None) -> None:
    """Change a plan in place: codes of experts are sharded like the dense weights were, other rules are dropped.

    Tensor parallelism splits a weight within its rows or columns, over which the transforms of a quantized layer reach. So
    these layers are computed whole in every process.

    Args:
        model: with its quantized modules in their places.
        plan: Transformers' tensor-parallel or expert-parallel plan, {name with * for numbers: style}.
    """
    from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard

    if not plan:
        return
    dropped = []
    for name, module in quantized_modules(model).items():
        kind = replace_layer_number_by_wildcard(name)
        if isinstance(module, QuipExperts):
            for stack in module.stacks:
                if plan.get(f"{kind}.{stack}") == _SHARDS:
                    plan.update({f"{kind}.{parameter}": _SHARDS for _, parameter in module.tensor_names(stack)})
                elif f"{kind}.{stack}" in plan:
                    dropped.append(f"{kind}.{stack}")
                    del plan[f"{kind}.{stack}"]
        if kind in plan and plan[kind] not in _EXPERT_STYLES:
            dropped.append(kind)
            del plan[kind]
    distributed = torch.distributed
    if dropped and distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        logger.warning(
            "Tensor parallelism cannot split the codes of quantized layers, so every process computes them whole: %s",
            ", ".join(sorted(set(dropped))),
        )
