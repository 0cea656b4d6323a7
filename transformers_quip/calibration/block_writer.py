"""Text that a model writes itself, with the weights of one block in memory at a time.

All documents advance by one token together: through the first block, then through the second one. So the weights are
read once for each token, however many documents there are. Their keys and values are in files that are mapped into memory.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm.auto import tqdm

from .arguments import cache_argument
from .blocks import find_blocks
from .capture import BlockCall, BlockInputs, record_calls, run_after_blocks
from .growing_cache import growing_cache
from .synthetic import Part

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class BlockWriter:
    """A writer for [`synthetic.write_text`].

    Args:
        part: makes the context in which the block with this prefix ("model.layers.3.") is in memory.
        folder: for the files of keys and values, which are deleted at the end.
    """

    def __init__(self, part: Callable[[str], AbstractContextManager], folder: Path):
        self._part, self._folder = part, folder

    def __call__(
        self, model: PreTrainedModel, parts: Sequence[Part], length: int, greedy_tokens: int, bar: tqdm
    ) -> list[torch.Tensor]:
        """Write the documents of all parts, each up to `length` tokens: int64 [B, length] for each part."""
        name, blocks = find_blocks(model)
        caches = []
        try:
            for number, part in enumerate(parts):
                part.draw_all(length - 1 - greedy_tokens)
                folder = self._folder / f"cache-{number}"
                folder.mkdir(parents=True, exist_ok=True)
                caches.append(growing_cache(model.config, length, folder))
            bar.update(len(parts))
            for position in range(1, length):
                self._step(model, name, blocks, parts, caches, position <= greedy_tokens)
                bar.update(len(parts))
        finally:
            caches.clear()
            for number in range(len(parts)):
                shutil.rmtree(self._folder / f"cache-{number}", ignore_errors=True)
        return [part.text for part in parts]

    def _step(
        self,
        model: PreTrainedModel,
        name: str,
        blocks: nn.ModuleList,
        parts: Sequence[Part],
        caches: list[Any],
        greedy: bool,
    ) -> None:
        """One more token for every document."""
        argument = str(cache_argument(model))
        calls: list[list[BlockCall]] = []
        hidden: list[torch.Tensor] = []
        for part, cache in zip(parts, caches, strict=True):
            entering, own, as_tuple = record_calls(model, blocks, part.tokens, {"use_cache": True, argument: cache})
            hidden.append(entering)
            calls.append(own)
        for index, block in enumerate(blocks):
            with self._part(f"{name}.{index}."):
                for number, states in enumerate(hidden):
                    hidden[number] = BlockInputs([states], [calls[number][index]]).call(block, 0)
        for part, states in zip(parts, hidden, strict=True):
            part.extend(run_after_blocks(model, blocks, part.tokens, states, as_tuple).logits[:, -1], greedy)
