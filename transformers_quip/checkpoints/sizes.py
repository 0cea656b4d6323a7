"""Sizes in a config.json: those for which a model would be built until the memory ends, and those of another model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .headers import DAMAGED

# More than any model has by two orders of magnitude; built in seconds.
MOST_LAYERS = 10_000

# Numbers that a quantized model has in common with the dense one that it was made from.
_KEPT = ("model_type", "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads")


def check_layers(config: Any) -> None:
    """Refuse a number of layers that no model has. A layer without weights is built quickly, but not 2⁶³ of them.

    Args:
        config: of a model (`PretrainedConfig`).

    Raises:
        ValueError: it has more than `MOST_LAYERS` layers.
    """
    for part in (config, config.get_text_config()):
        layers = getattr(part, "num_hidden_layers", None)
        if isinstance(layers, int) and layers > MOST_LAYERS:
            raise ValueError(f"config.json has num_hidden_layers={layers}, more than any model: {DAMAGED}")


def check_same_sizes(config: Mapping[str, Any], dense: Mapping[str, Any]) -> None:
    """Refuse a dense model from which this quantized one cannot have been made.

    Args:
        config, dense: the contents of the config.json of each.

    Raises:
        ValueError: one of the sizes that both name differs.
    """
    for name in _KEPT:
        if name in config and name in dense and config[name] != dense[name]:
            raise ValueError(f"its {name} is {dense[name]}, and that of the quantized model is {config[name]}")
