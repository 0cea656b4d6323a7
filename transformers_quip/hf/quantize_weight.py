"""Quantize each weight as soon as Transformers' loader has read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers.core_model_loading import ConversionOps

from ..checkpoints.memory import PageReleaser
from ..config import QuipConfig
from ..nn import replace
from ..nn.stacks import Stack, find_stacks
from ..quantize.bars import LoadingBar
from ..quantize.embedding import quantize_embedding
from ..quantize.layer import QuantizedWeight, quantize_weight
from ..quantize.stack import QuantizedStack, quantize_stack
from .loader import RaisedLater

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class QuantizeWeight(ConversionOps):
    """Quantizes one weight as soon as the loader has read it, and replaces the dense module by the quantized one.

    Args:
        config: the options.
        weights: the names of the tensors to quantize → the names that their modules, or the stacks, have in the plan.
        stacks: the stacks of experts among the weights to quantize, by the full names of their parameters.
        releaser: is told of weights that are done with.
        bar: is advanced.

    Attributes:
        done: the names of the weights that were quantized.
    """

    def __init__(
        self,
        config: QuipConfig,
        weights: Mapping[str, str],
        stacks: Mapping[str, Stack],
        releaser: PageReleaser,
        bar: LoadingBar,
    ):
        self.config, self.weights, self.stacks = config, weights, stacks
        self.releaser = releaser
        self.bar = bar
        self.done: list[str] = []
        self._waiting: dict[str, dict[str, QuantizedStack]] = {}

    def convert(
        self,
        input_dict: dict[str, Any],
        full_layer_name: str,
        model: PreTrainedModel,
        missing_keys: set[str],
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """Turn {name: weight} into the tensors of the quantized module by their full names.

        A weight that the loader has split has several names, of which some may not be quantized: those are passed on.
        """
        if len(input_dict) == 1:
            input_dict = {full_layer_name: next(iter(input_dict.values()))}
        result: dict[str, torch.Tensor] = {}
        for target, given in input_dict.items():
            weight = given[0] if isinstance(given, list) else given
            if target not in self.weights:
                result[target] = weight
                continue
            name = self.weights[target]
            try:
                values = self._quantized(model, name, weight)
            except Exception as error:
                return RaisedLater(error)
            missing_keys.discard(target)
            self.done.append(name)
            self.releaser.handled(weight.nbytes)
            result |= values
        return result

    def _quantized(self, model: PreTrainedModel, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Quantize a weight, put the quantized module in its place, and return its tensors by their full names."""
        if name in self.stacks:
            return self._experts(model, name, self._stack(model, name, weight))
        quantized = self._module(model, name, weight)
        self.bar.advance(name, quantized.statistics["relative_error"])
        values = {**quantized.tensors, "su": quantized.su, "sv": quantized.sv}
        module: Any = replace.replace_by_empty(model, name, self.config)
        module.resize_stored({key: value.shape for key, value in values.items()})
        return {
            f"{name}.{key}": value.to(device=weight.device, dtype=getattr(module, key).dtype).contiguous()
            for key, value in values.items()
        }

    def _experts(self, model: PreTrainedModel, name: str, quantized: QuantizedStack) -> dict[str, torch.Tensor]:
        """The tensors of a module of experts when its last projection is there; none before.

        Until then the dense module stays: rules of Transformers ask for the shape of the next projection's weight.
        """
        self.bar.advance(name, quantized.statistics["relative_error"])
        experts, _, stack = name.rpartition(".")
        waiting = self._waiting.setdefault(experts, {})
        waiting[stack] = quantized
        if any(other not in waiting for other in find_stacks(model.get_submodule(experts))):
            return {}
        module, values = replace.replace_experts(model, experts, self.config), {}
        for key, stacked in self._waiting.pop(experts).items():
            tensors = {**stacked.tensors, "su": stacked.su, "sv": stacked.sv}
            for part, parameter in module.tensor_names(key):
                dtype = module.get_parameter(parameter).dtype
                values[f"{experts}.{parameter}"] = tensors[part].to(dtype).contiguous()
        return values

    def _module(self, model: PreTrainedModel, name: str, weight: torch.Tensor) -> QuantizedWeight:
        """The replacement of a linear's or an embedding's weight."""
        linear = model.get_submodule(name)
        quantize = quantize_embedding if replace.is_dense_embedding(linear) else quantize_weight
        return quantize(replace.dense_weight(linear, weight), self.config.for_module(name), name)

    def _stack(self, model: PreTrainedModel, name: str, weight: torch.Tensor) -> QuantizedStack:
        """The replacement of a projection's weights of all experts."""
        return quantize_stack(self.stacks[name].split(weight), self.config.for_module(name), name)
