"""The progress bar of a quantization: block, module, error, and tqdm's time left."""

from __future__ import annotations

import re
from collections.abc import Collection

from tqdm.auto import tqdm


def advance(bar: tqdm, name: str, error: float, mean: float) -> None:
    """Show a quantized module: its relative error, and the mean of all so far."""
    bar.set_postfix_str(f"{name.rpartition('.')[2]}: relative error {error:.4f}, mean {mean:.4f}", refresh=False)
    bar.update()


class LoadingBar:
    """The bar of weights that are quantized as they are read; Transformers' own counts all tensors above it.

    Args:
        names: of the modules. The first number in a name is its block.
    """

    def __init__(self, names: Collection[str]):
        self._blocks = 1 + max((block for block in map(_block, names) if block is not None), default=-1)
        self._total, self._errors = len(names), 0.0
        self._bar: tqdm | None = None

    def advance(self, name: str, error: float) -> None:
        """Count a quantized weight; the bar appears with the first and disappears with the last."""
        if self._bar is None:
            self._bar = tqdm(total=self._total, unit="layer")
        block = _block(name)
        place = "Outside the blocks" if block is None else f"Block {block + 1} of {self._blocks}"
        self._bar.set_description(place, refresh=False)
        self._errors += error
        advance(self._bar, name, error, self._errors / (self._bar.n + 1))
        if self._bar.n == self._total:
            self._bar.close()
            self._bar = None  # a model that holds a bar could not be copied


def _block(name: str) -> int | None:
    number = re.search(r"\.(\d+)\.", name)
    return int(number[1]) if number else None
