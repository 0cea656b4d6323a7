"""A key/value cache that neither copies itself at each token nor shows attention its unused part.

Transformers' DynamicCache concatenates at each step, and its StaticCache needs a mask, with which SDPA repeats the
keys of grouped-query attention: 12 times slower on a CPU.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from .mapped import mapped


class GrowingLayer(DynamicLayer):
    """A DynamicLayer over memory set aside at the first token; `keys` and `values` are views of the filled part.

    Args:
        capacity: in tokens.
        file: to keep keys and values in, mapped into memory, so that the system may write them out; None: in memory, on
            the device of the first token's. What attention is given is on its own device in both cases.
    """

    def __init__(self, capacity: int, file: Path | None = None):
        super().__init__()
        self.capacity, self.file = capacity, file

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        shapes = [(*states.shape[:-2], self.capacity, states.shape[-1]) for states in (key_states, value_states)]
        if self.file is None:
            self._key_memory, self._value_memory = (key_states.new_empty(shape) for shape in shapes)
        else:
            self._key_memory, self._value_memory = mapped(self.file, shapes, self.dtype, new=True)
        self.keys, self.values = self._key_memory[..., :0, :], self._value_memory[..., :0, :]
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [B, heads, tokens, head_dim] and return all keys and values so far.

        Raises:
            ValueError: more tokens than the capacity.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.keys.shape[-2]
        end = start + key_states.shape[-2]
        if end > self.capacity:
            raise ValueError(f"A cache for {self.capacity} tokens cannot hold {end}.")
        self._key_memory[..., start:end, :] = key_states
        self._value_memory[..., start:end, :] = value_states
        self.keys, self.values = self._key_memory[..., :end, :], self._value_memory[..., :end, :]
        return self.keys.to(key_states.device), self.values.to(key_states.device)


def growing_cache(config: PreTrainedConfig, capacity: int, folder: Path | None = None) -> DynamicCache:
    """An empty DynamicCache for a model of this config, whose full-attention layers have room for `capacity` tokens.

    Layers of other kinds (sliding windows, states of linear attention) stay as Transformers makes them.

    Args:
        folder: an existing folder for one file for each layer; None: in memory.
    """
    cache = DynamicCache(config=config)
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[index] = GrowingLayer(capacity, None if folder is None else folder / f"{index}.bin")
    return cache


def cache_bytes(cache: DynamicCache, tokens: int) -> int:
    """The bytes that a cache which holds one token needs for `tokens` tokens.

    Layers with a state of fixed size (linear attention) do not grow; sliding windows are counted in full.
    """
    total = 0
    for layer in cache.layers:
        tensors = {name: value for name, value in vars(layer).items() if isinstance(value, torch.Tensor)}
        growing = sum(tensors[name].nbytes for name in ("keys", "values") if name in tensors)
        total += growing * tokens or sum(value.nbytes for value in tensors.values())
    return total
