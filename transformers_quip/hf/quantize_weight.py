"""Quantize each weight as soon as Transformers' loader has read it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.core_model_loading import ConversionOps

from ..checkpoints.memory import PageReleaser
from ..config import QuipConfig
from ..nn import replace
from ..quantize.bars import LoadingBar
from ..quantize.embedding import quantize_embedding
from ..quantize.layer import quantize_weight
from .loader import RaisedLater

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class QuantizeWeight(ConversionOps):
    """Quantizes one weight as soon as the loader has read it, and replaces the dense module by the quantized one."""

    def __init__(self, config: QuipConfig, releaser: PageReleaser, bar: LoadingBar):
        self.config = config
        self.releaser = releaser
        self.bar = bar

    def convert(
        self,
        input_dict: dict[str, Any],
        full_layer_name: str,
        model: PreTrainedModel,
        missing_keys: set[str],
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """Turn {…: weight} into the tensors of the quantized module by their full names."""
        (weight,) = input_dict.values()
        weight = weight[0] if isinstance(weight, list) else weight
        name = full_layer_name.removesuffix(".weight")
        linear = model.get_submodule(name)
        quantize = quantize_embedding if replace.is_dense_embedding(linear) else quantize_weight
        try:
            quantized = quantize(replace.dense_weight(linear, weight), self.config.for_module(name), name)
        except Exception as error:
            return RaisedLater(error)
        self.bar.advance(name, quantized.statistics["relative_error"])
        module = replace.replace_by_empty(model, name, self.config)
        missing_keys.discard(full_layer_name)
        self.releaser.handled(weight.nbytes)
        values = {**quantized.tensors, "su": quantized.su, "sv": quantized.sv}
        module.resize_stored({key: value.shape for key, value in values.items()})
        return {
            f"{name}.{key}": value.to(device=weight.device, dtype=getattr(module, key).dtype).contiguous()
            for key, value in values.items()
        }
