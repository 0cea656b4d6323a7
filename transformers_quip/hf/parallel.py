"""What Transformers' ways to share a model among devices can do with quantized modules."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from transformers.quantizers.base import HfQuantizer

from ..nn.embedding import QuipEmbedding
from ..nn.experts import QuipExperts
from ..nn.fused import FusedRows, JoinedLinear
from ..nn.linear import QuipLinear
from ..nn.unstacked import UnstackedExperts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..config import QuipConfig

logger = logging.getLogger(__name__)

# The styles of expert parallelism: whole experts in each process.
_SHARDS = "grouped_gemm"
_EXPERT_STYLES = (_SHARDS, "ep_dispatch_experts", "ep_router")


def check(model: PreTrainedModel, config: QuipConfig, pre_quantized: bool) -> None:
    """Refuse tensor parallelism before weights are read, where it is not available.

    Raises:
        ValueError: the model is loaded with tp_plan, or with a `DistributedConfig` of a tp_size above 1 without
            ep_size, and it is not a quantized model in the native format, or Transformers is too old.
    """
    size = _divided_by(model)
    if size == 1:
        return
    start = f"Tensor parallelism (tp_size={size}) is not available"
    if config.foreign is not None:
        raise ValueError(
            f"{start} for checkpoints of other packages: convert it first (transformers-quip convert MODEL FOLDER)"
        )
    if not pre_quantized:
        raise ValueError(
            f"{start} while a model is quantized: quantize and save it in one process, then load it with tp_plan"
        )
    if not hasattr(HfQuantizer, "update_parallel_plan"):
        raise ValueError(
            f"{start} for quantized models with this Transformers: pip install -U transformers (5.23 or newer)"
        )


def _divided_by(model: PreTrainedModel) -> int:
    """The number of processes that share each layer; 1 for expert parallelism, in which they share the experts alone."""
    distributed = getattr(model.config, "distributed_config", None)
    size, experts = (getattr(distributed, name, None) or 1 for name in ("tp_size", "ep_size"))
    return size if experts == 1 else 1


def update_plan(model: PreTrainedModel, plan: dict[str, str] | None) -> None:
    """Change a plan in place to styles that quantized modules can follow.

    Codes of experts are sharded like the dense weights were. Linears get the styles of `tensor_parallel`. Other rules of
    quantized modules are dropped: these modules are computed whole in every process.

    Args:
        model: with its quantized modules in their places.
        plan: Transformers' tensor-parallel or expert-parallel plan, {name with * for numbers: style}.

    Raises:
        ValueError: layers are divided among processes, and a rule for quantized ones cannot be followed or dropped.
    """
    from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard

    from .tensor_parallel import DIVISIONS, name_of, register

    if not plan:
        return
    register()
    dropped: list[str] = []
    refused: list[str] = []
    given = getattr(getattr(model.config, "distributed_config", None), "tp_plan", None)
    for name, module in model.named_modules():
        kind = replace_layer_number_by_wildcard(name)
        if isinstance(module, (QuipLinear, FusedRows)):
            for rules in (plan, given if isinstance(given, dict) else {}):
                if rules.get(kind) in DIVISIONS:
                    rules[kind] = name_of(rules[kind])
        if isinstance(module, QuipExperts):
            for stack in module.stacks:
                if plan.get(f"{kind}.{stack}") == _SHARDS:
                    plan.update({f"{kind}.{parameter}": _SHARDS for _, parameter in module.tensor_names(stack)})
                elif f"{kind}.{stack}" in plan:
                    dropped.append(f"{kind}.{stack}")
                    del plan[f"{kind}.{stack}"]
        if not isinstance(module, (QuipLinear, QuipEmbedding, QuipExperts, FusedRows, JoinedLinear, UnstackedExperts)):
            continue
        style = plan.get(kind)
        if style is None or style in _EXPERT_STYLES or style in map(name_of, DIVISIONS):
            continue
        (dropped if isinstance(module, (QuipEmbedding, QuipExperts)) else refused).append(kind)
        del plan[kind]
    if refused and _divided_by(model) > 1:
        raise ValueError(
            f"Tensor parallelism (tp_size={_divided_by(model)}) is not available for {', '.join(sorted(set(refused)))} of "
            "this quantized model: use device_map='auto', which gives whole layers to each device, or one copy for each"
        )
    distributed = torch.distributed
    if dropped and distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        logger.warning(
            "Tensor parallelism cannot split the codes of some quantized layers, so every process computes them whole: %s",
            ", ".join(sorted(set(dropped))),
        )
