"""What Transformers' ways to share a model among devices can do with quantized modules."""

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


def check(model: PreTrainedModel) -> None:
    """Refuse tensor parallelism before weights are read, where it is not a part of expert parallelism.

    Transformers' plan cuts every tensor of a linear by its rows or its columns. The transforms of a quantized linear mix
    all of its inputs, and all of its outputs, so a part of su or sv belongs to no part of the linear.

    Raises:
        ValueError: the model is loaded with tp_plan, or with a `DistributedConfig` of a tp_size above 1 without
            ep_size.
    """
    distributed = getattr(model.config, "distributed_config", None)
    size, experts = (getattr(distributed, name, None) or 1 for name in ("tp_size", "ep_size"))
    if size > 1 and experts == 1:
        raise ValueError(
            f"Tensor parallelism (tp_size={size}) is not available for quantized models: the transforms of a linear mix "
            "all of its inputs and outputs, so its rows cannot be computed apart. Use device_map='auto', which gives whole "
            "layers to each device, or one copy of the model for each device: at 2 bits a 70B takes 22 GB"
        )


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
