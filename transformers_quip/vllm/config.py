"""The quantization method "quip" of vLLM: which layer of the model has which quantized weights of the checkpoint.

Every process of vLLM imports this file, whichever model it serves. So everything that only quantized models need is
imported when one is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

if TYPE_CHECKING:
    from ..config import QuipConfig

# The last parts of names of token embeddings; vLLM gives its module of embeddings no name in some models.
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "embeddings")


class QuipVllmConfig(QuantizationConfig):
    """A native checkpoint's `quantization_config`.

    Args:
        config: of the checkpoint.

    Attributes:
        names: of the quantized modules in vLLM's model, as if it fused none → in the checkpoint.

    Raises:
        ValueError: the config names no quantized modules, or it names them in a way that cannot be read.
    """

    def __init__(self, config: QuipConfig):
        from ..checkpoints.names import expand_names

        super().__init__()
        if config.quantized_modules is None:
            raise ValueError(
                "The quantization_config of this model names no quantized_modules, so it was not saved by "
                "transformers-quip after quantizing: quantize the original model, or restore its config.json"
            )
        self.quip = config
        self.names = {name: name for name in expand_names(config.quantized_modules)}

    def get_name(self) -> Any:
        """See the base class."""
        return "quip"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """See the base class."""
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """See the base class: the oldest GPU that the Triton kernels are compiled for. A CPU is not asked."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: config.json has it."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QuipVllmConfig:
        """See the base class.

        Raises:
            ValueError: the config cannot be read, or it is of another package; the message says what to do.
        """
        from ..checkpoints.foreign.plan import METHODS
        from ..config import QuipConfig

        method = config.get("quant_method")
        if method in METHODS:
            raise ValueError(
                f"This model was quantized by another package (quant_method={method!r}). Convert it without loss first "
                "(transformers-quip convert MODEL FOLDER) and serve the result"
            )
        return cls(QuipConfig.from_dict(config))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """See the base class: vLLM renames modules of some models."""
        self.names = hf_to_vllm_mapper.apply_dict(self.names)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """The method of one layer; None where vLLM's own for dense weights is right.

        Raises:
            ValueError: the layer is stored in a way that vLLM cannot run; the message names it and the remedy.
        """
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

        if isinstance(layer, LinearBase):
            return self._linear(prefix) or UnquantizedLinearMethod()
        if isinstance(layer, RoutedExperts):
            return self._experts(layer, prefix)
        if isinstance(layer, ParallelLMHead):
            return self._linear(prefix)
        if isinstance(layer, VocabParallelEmbedding):
            return self._embedding(prefix)
        return None  # attention, for example

    def _linear(self, prefix: str) -> Any:
        from .linear import QuipLinearMethod
        from .parts import Origin

        known = [self.names.get(name) for name in self._parts(prefix)]
        if not any(known):
            self._refuse_parts(prefix)
            return None
        return QuipLinearMethod([None if name is None else Origin.of(self.quip, name) for name in known], prefix)

    def _parts(self, prefix: str) -> list[str]:
        """The names of the linears that vLLM has fused in the layer of this name, or its own."""
        parent, dot, last = prefix.rpartition(".")
        fused = [] if prefix in self.names else self.packed_modules_mapping.get(last, [])
        return [f"{parent}{dot}{part}" for part in fused] or [prefix]

    def _refuse_parts(self, prefix: str) -> None:
        inside = next((name for name in self.names if name.startswith(f"{prefix}.")), None)
        if inside is not None:
            raise ValueError(
                f"{prefix} is stored as several quantized linears ({inside}), which vLLM cannot load: load the model with "
                "Transformers, call model.dequantize(), and quantize the dense model"
            )

    def _embedding(self, prefix: str) -> Any:
        from .embedding import QuipEmbeddingMethod

        if prefix in self.names:
            return QuipEmbeddingMethod(self.quip, self.names[prefix])
        if prefix:
            return None
        found = [name for name in self.names.values() if name.rpartition(".")[2] in _EMBEDDINGS]
        if len(found) > 1:
            raise ValueError(f"vLLM does not say which of {', '.join(found)} its embedding without a name is")
        return QuipEmbeddingMethod(self.quip, found[0]) if found else None

    def _experts(self, layer: Any, prefix: str) -> Any:
        from .experts import DOWN, GATE_UP, QuipExpertsMethod
        from .parts import Origin

        name = prefix.removesuffix(".routed_experts")
        inside = {known.removeprefix(f"{name}."): own for known, own in self.names.items() if known.startswith(f"{name}.")}
        if not inside:
            return None
        if set(inside) != {GATE_UP, DOWN}:
            raise ValueError(
                f"{name} has experts whose quantized weights are {', '.join(sorted(inside)[:3])} …, which vLLM cannot load "
                f"(only stacks {GATE_UP} and {DOWN}): use transformers-quip serve"
            )
        origins = {projection: Origin.of(self.quip, own) for projection, own in inside.items()}
        return QuipExpertsMethod(layer.moe_config, origins, name)


class Exl3VllmConfig(QuipVllmConfig):
    """The same under the name that a checkpoint of EXL3 gives; it is refused."""

    def get_name(self) -> Any:
        """See the base class."""
        return "exl3"
