"""Token embeddings of vLLM whose table is quantized."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.utils import set_weight_attrs

from ..checkpoints.headers import DAMAGED
from ..config import QuipConfig
from ..nn.embedding import QuipEmbedding
from .parts import WITHOUT_FILES


class QuipEmbeddingMethod(QuantizeMethodBase):
    """The method of a module of embeddings. Every process holds all of the table: at 2 bits it is small.

    Args:
        config: of the checkpoint. name: of the embedding in it.
    """

    def __init__(self, config: QuipConfig, name: str):
        self.config, self.name = config, name

    def create_weights(self, layer: Any, *sizes: Any, params_dtype: torch.dtype, **others: Any) -> None:
        """See the base class.

        Raises:
            ValueError: the codebook stores tensors whose sizes only the file knows.
        """
        padded = self.config.storage_of(self.name).padded
        with torch.device("meta"):
            table = nn.Embedding(layer.org_vocab_size, layer.embedding_dim, dtype=params_dtype)
        self.module = QuipEmbedding.like(table, self.config.for_module(self.name), padded[1] if padded else None)
        layer.weight = torch.empty(0, dtype=params_dtype)  # vLLM's LoRA layers ask for its device
        self.loaded: set[str] = set()
        self.expects_all = get_current_vllm_config().load_config.load_format not in WITHOUT_FILES
        self.shapes = {name: tuple(parameter.shape) for name, parameter in self.module.named_parameters()}
        for name, parameter in self.module.named_parameters():
            if not parameter.numel():
                raise ValueError(f"{self.name}.{name} has a size that only the file knows, which vLLM cannot load")
            room = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype), requires_grad=False)
            set_weight_attrs(room, {"weight_loader": self._loader(name)})
            layer.register_parameter(name, room)

    def _loader(self, name: str) -> Callable[..., None]:
        def load(param: torch.Tensor, loaded_weight: torch.Tensor) -> None:
            if loaded_weight.shape != param.shape:
                raise ValueError(
                    f"{self.name}.{name} has shape {list(loaded_weight.shape)} instead of {list(param.shape)}: {DAMAGED}"
                )
            param.data.copy_(loaded_weight)
            self.loaded.add(name)

        return load

    def process_weights_after_loading(self, layer: Any) -> None:
        """See the base class. Raises `ValueError` for tensors that the checkpoint does not have."""
        missing = self.shapes.keys() - self.loaded
        if missing and self.expects_all:
            raise ValueError(f"{self.name}: {', '.join(sorted(missing))} of the embedding are not in the checkpoint")
        self.module._parameters.update({name: layer.get_parameter(name) for name in self.shapes})
        layer.weight = layer.weight.to(layer.su.device)

    def apply(self, layer: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Raises `TypeError`: a quantized table is not an output head."""
        raise TypeError(
            f"{self.name} is quantized, so it cannot be used as output head: quantize lm_head, or leave it dense"
        )

    def embedding(self, layer: Any, input_: torch.Tensor) -> torch.Tensor:
        """The rows of these tokens, counted from the first one of this process."""
        return self.module(input_ + layer.shard_indices.org_vocab_start_index if layer.tp_size > 1 else input_)
