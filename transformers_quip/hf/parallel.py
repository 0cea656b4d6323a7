"""What Transformers' ways to share a model among devices can do with quantized modules."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check(model: PreTrainedModel) -> None:
    """Refuse tensor parallelism before weights are read.

    Transformers' plan cuts every tensor of a linear by its rows or its columns. The transforms of a quantized linear mix
    all of its inputs, and all of its outputs, so a part of su or sv belongs to no part of the linear.

    Raises:
        ValueError: the model is loaded with tp_plan, or with a `DistributedConfig` of a tp_size above 1.
    """
    size = getattr(getattr(model.config, "distributed_config", None), "tp_size", None) or 1
    if size > 1:
        raise ValueError(
            f"Tensor parallelism (tp_size={size}) is not available for quantized models: the transforms of a linear mix "
            "all of its inputs and outputs, so its rows cannot be computed apart. Use device_map='auto', which gives whole "
            "layers to each device, or one copy of the model for each device: at 2 bits a 70B takes 22 GB"
        )
