"""Factors that exllamav3 multiplies into the weights of some architectures before it quantizes them.

Its own code undoes them while the model runs (it scales the routing weights, or leaves the values of the attention
unscaled); Transformers' code knows nothing of them, so they are undone in the weights. Of every layer n (version 1.4 to
1.6.5 of the package):

    Laguna, Mistral-4   `layers.n.mlp.experts.*.up_proj` holds W / 128; the shared experts hold W
    MiMo-V2             `layers.47.mlp.experts.*.up_proj` holds W / 128; every `self_attn.o_proj` holds
                        W · attention_value_scale, by which Transformers multiplies the values
"""

from __future__ import annotations

import re
from typing import Any

from ..headers import DAMAGED
from .family import is_finite_number

_UP = 1 / 128
_ROUTED_UP = re.compile(r"(?:^|\.)layers\.(\d+)\.(?:\w+\.)*experts\.\d+\.(?:up_proj|w3)$")
_OUTPUT = re.compile(r"(?:^|\.)layers\.\d+\.self_attn\.o_proj$")
# model_type → the layers whose routed experts hold W / 128; None means all of them.
_LAYERS: dict[str, int | None] = {"laguna": None, "mistral4": None, "mimo_v2_flash": 47}


def folded_factor(config: Any, name: str) -> float:
    """The number by which exllamav3 multiplied the weight of a linear; 1 for almost every linear.

    Args:
        config: of the model (a `PretrainedConfig`).
        name: of the linear in the file.

    Raises:
        ValueError: the model is a MiMo-V2 of a kind for which the factors are not known, or its config has no valid
            `attention_value_scale`.
    """
    text = config.get_text_config()
    kind = text.model_type
    if kind not in _LAYERS:
        if str(kind).startswith("mimo_v2"):
            raise ValueError(
                f"model_type={kind!r}: exllamav3 folds factors into the weights of MiMo-V2 models, and they are known for "
                "'mimo_v2_flash' only, so this EXL3 checkpoint cannot be loaded"
            )
        return 1.0
    match = _ROUTED_UP.search(name)
    if match and _LAYERS[kind] in (None, int(match[1])):
        return _UP
    if kind == "mimo_v2_flash" and _OUTPUT.search(name):
        return _value_scale(text)
    return 1.0


def _value_scale(config: Any) -> float:
    scale = config.attention_value_scale
    if scale is None:
        return 1.0
    if not is_finite_number(scale) or scale <= 0:
        raise ValueError(f"config.json has attention_value_scale={scale!r}, which must be a positive number: {DAMAGED}")
    return float(scale)
