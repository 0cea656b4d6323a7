"""Sizes in a config.json for which a model would be built until the memory ends."""

from __future__ import annotations

from typing import Any

from .headers import DAMAGED

# More than any model has by two orders of magnitude; built in seconds.
MOST_LAYERS = 10_000


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
