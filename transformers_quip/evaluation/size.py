"""Bytes on disk, and true bits per weight of the quantized linears."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn


@dataclass(frozen=True)
class LinearSize:
    """Size of one quantized linear: its weights (out_features x in_features) and all bytes that stand for them."""

    name: str
    weights: int
    bytes: int

    @property
    def bits(self) -> float:
        """True bits per weight."""
        return 8 * self.bytes / self.weights


def linear_sizes(model: nn.Module) -> list[LinearSize]:
    """Return the size of every quantized linear (or embedding) of `model`, in the order of its modules.

    A quantized module has the property `packed_bytes`, as `transformers_quip.nn.QuipLinear` does. It counts the codes
    (with completed blocks), the codes of a second stage, su and sv.
    """
    return [
        LinearSize(name, module.weight.numel(), module.packed_bytes)
        for name, module in model.named_modules()
        if hasattr(module, "packed_bytes")
    ]


def true_bits_per_weight(model: nn.Module) -> float:
    """Return all bytes of the quantized linears of `model` x 8 / their weights.

    Raises:
        ValueError: the model has no quantized linear.
    """
    sizes = linear_sizes(model)
    if not sizes:
        raise ValueError(f"{type(model).__name__} has no quantized linear: was it loaded with a QuipConfig?")
    return 8 * sum(size.bytes for size in sizes) / sum(size.weights for size in sizes)


def safetensors_bytes(folder: str | Path) -> int:
    """Return the size in bytes of all safetensors files directly in `folder`, headers included.

    Raises:
        ValueError: the folder has no safetensors file.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise ValueError(f"no safetensors file in {folder}")
    return sum(file.stat().st_size for file in files)
