"""The LoRA layers that PEFT has put around quantized linears."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from ..nn import QuipLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def require_peft() -> Any:
    """PEFT's module. Raises `ImportError` with the remedy if it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise ImportError("adapters need PEFT: pip install 'transformers-quip[peft]'") from error
    return peft


def adapted_linears(base: PreTrainedModel | nn.Module) -> dict[str, Any]:
    """The LoRA layers around quantized linears, by the names that those have in the model without adapters."""
    from peft.tuners.lora import LoraLayer

    return {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, LoraLayer) and isinstance(module.get_base_layer(), QuipLinear)
    }


def check_in_memory(name: str, layer: Any) -> None:
    """Raise `ValueError` if the codes of this LoRA layer's quantized linear are on the disk."""
    if any(parameter.is_meta for parameter in layer.get_base_layer().parameters()):
        raise ValueError(f"{name} is offloaded, so its weight cannot be decoded: load without a device_map that offloads")
