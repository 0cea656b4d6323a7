"""Find the linears whose weight a model reads without calling them: such a weight must stay dense.

The model's forward is run once on the meta device, on a model of the same config without values, so that it costs little
and happens before any work.
"""

from __future__ import annotations

import copy
import functools
import logging
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from ..nn.stand_in import METADATA
from .arguments import without_cache
from .device import is_linear

logger = logging.getLogger(__name__)

_TOKENS = 8


def kind_of(name: str) -> str:
    """A module's name without the numbers of blocks: what one block does, all blocks of its kind do."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def read_by_others(model: nn.Module) -> frozenset[str]:
    """The kinds ([`kind_of`]) of linears whose weight the model's forward on token ids reads by itself.

    Nothing is known, and the result is empty or incomplete, where the forward cannot be run without values: it needs
    images, or its way depends on numbers.

    Args:
        model: on any device; nothing is known of models that are not Transformers'.
    """
    if not isinstance(model, PreTrainedModel):
        return frozenset()
    cls: Any = type(model)
    return _read_by_others(cls, _Config(model.config))


class _Config:
    """A config that can be a key: two with the same content are equal."""

    def __init__(self, config: Any):
        self.config = config
        self.text = config.to_json_string(use_diff=False)

    def __hash__(self) -> int:
        return hash(self.text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Config) and self.text == other.text


@functools.lru_cache(maxsize=16)
def _read_by_others(cls: Any, key: _Config) -> frozenset[str]:
    config = copy.deepcopy(key.config)
    watch = None
    try:
        with torch.device("meta"), torch.no_grad():
            model = cls(config).eval()
            ids = torch.ones(1, _TOKENS, dtype=torch.int64)
            inputs = {"input_ids": ids}
            if getattr(config, "is_encoder_decoder", False):
                inputs["decoder_input_ids"] = ids
            watch = _Watch(model)
            with watch:
                model(**inputs, **without_cache(model))
    except Exception as error:  # of any kind: a forward without values may fail anywhere
        logger.debug("%s cannot be run without values (%s: %s)", cls.__name__, type(error).__name__, error)
    return frozenset() if watch is None else frozenset(watch.found)


class _Watch(TorchFunctionMode):
    """Notes the linears whose weights are used by a function outside of their own forward."""

    def __init__(self, model: nn.Module):
        super().__init__()
        linears = {name: module for name, module in model.named_modules() if is_linear(module)}
        self._names = {id(module.weight): kind_of(name) for name, module in linears.items()}
        self._inside = 0
        self.found: set[str] = set()
        for module in model.modules():
            if is_linear(module) or isinstance(module, nn.Embedding):  # which may share the weight of the head
                module.register_forward_pre_hook(self._enter)
                module.register_forward_hook(self._leave)

    def _enter(self, *_: Any) -> None:
        self._inside += 1

    def _leave(self, *_: Any) -> None:
        self._inside -= 1

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if not self._inside and func not in METADATA:
            for value in (*args, *(kwargs or {}).values()):
                for one in value if isinstance(value, (list, tuple)) else (value,):
                    if isinstance(one, nn.Parameter) and id(one) in self._names:
                        self.found.add(self._names[id(one)])
        return func(*args, **(kwargs or {}))
