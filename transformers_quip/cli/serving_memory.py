"""How much memory the cache of continuous batching may take.

Transformers takes a share of the whole memory (0.6 of it on a CPU, whatever else is running), and takes it at once. Here
the share is computed from the free memory, the model's own size, and the requested number of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..checkpoints.inventory import Inventory

# Most tokens in one forward pass: a long prompt is read in pieces of this size. On a CPU, larger pieces are not faster.
_BATCH_TOKENS = {"cpu": 512, "gpu": 4096}
# Share of the memory that is free when the model is loaded. A CPU's memory is also for other programs.
_USED = {"cpu": 0.5, "gpu": 0.8}
_REQUESTS = 1024  # Transformers keeps logits for this many requests at once
_FEWEST_TOKENS = 1024
_PROCESS = 1_000_000_000  # bytes of a process that has imported PyTorch and Transformers, rounded up


@dataclass(frozen=True)
class Memory:
    """Memory of a device in bytes: total, and free now. `kind` is "cpu" or "gpu"."""

    kind: str
    total: int
    free: int

    @classmethod
    def of(cls, device_map: str | None) -> Memory:
        """The memory of the device on which the server will run."""
        import psutil  # type: ignore[import-untyped]
        import torch

        if device_map != "cpu" and torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info(device_map if device_map and ":" in device_map else None)
            return cls("gpu", total, free)
        memory = psutil.virtual_memory()
        return cls("cpu", memory.total, memory.available)


@dataclass(frozen=True)
class Plan:
    """The settings for Transformers: `tokens` in the cache, `batch_tokens` in one forward pass, and `bytes` for all of it.

    `share` is `bytes` divided by the memory that is there when the model has been loaded.
    """

    tokens: int
    batch_tokens: int
    bytes: int
    share: float


def plan(inventory: Inventory, memory: Memory, cache_tokens: int) -> Plan | None:
    """The largest cache that fits, of at most `cache_tokens`; None if the bytes of a token do not follow from the config.

    Raises:
        ValueError: not even a small useful one fits.
    """
    sizes = _sizes(inventory.config)
    per_token = inventory.cache_bytes(1)
    if sizes is None or per_token is None:
        return None
    width, hidden, vocabulary, heads = sizes
    item = 4 if str(inventory.config.get("dtype") or inventory.config.get("torch_dtype")) == "float32" else 2
    per_token = per_token // 2 * item + 3 * heads * width * item + 64  # keys and values stored, and one layer's read back
    batch = _BATCH_TOKENS[memory.kind]
    fixed = _REQUESTS * (hidden * item + 4 * vocabulary) + batch * item * (3 * hidden + 5 * heads * width) + 2**20
    mask = 4 * item * batch  # bytes for each token of the cache: two kinds of mask, for two batches that overlap
    left = memory.free - inventory.total_bytes - (_PROCESS if memory.kind == "cpu" else 0)
    room = int(left * _USED[memory.kind])
    tokens = min(cache_tokens, (room - fixed - mask * batch) // (per_token + mask))
    if tokens < min(cache_tokens, _FEWEST_TOKENS):
        raise ValueError(
            f"{max(left, 0) / 1e9:.2f} GB are free when the model is loaded, and a cache of "
            f"{min(cache_tokens, _FEWEST_TOKENS)} tokens with the tensors of a batch does not fit into "
            f"{_USED[memory.kind]:.0%} of that: free some memory, or answer requests with --one-by-one"
        )
    needed = fixed + mask * batch + tokens * (per_token + mask)
    there = left if memory.kind == "gpu" else memory.total - inventory.total_bytes - _PROCESS
    return Plan(tokens, batch, needed, min(needed / there, 0.95))


def _sizes(config: Mapping[str, object]) -> tuple[int, int, int, int] | None:
    """(width of a head, hidden size, size of the vocabulary, heads)"""
    inner = config.get("text_config")
    merged = {**config, **inner} if isinstance(inner, Mapping) else config
    found = [merged.get(name) for name in ("hidden_size", "vocab_size", "num_attention_heads")]
    if not all(type(value) is int and 0 < value < 2**40 for value in found):
        return None
    hidden, vocabulary, heads = (int(value) for value in found)  # type: ignore[call-overload]
    width = merged.get("head_dim")
    return (width if type(width) is int and width > 0 else hidden // heads), hidden, vocabulary, heads
