"""The recipe: the choice of modules (`plan`), one weight (`layer`), one block (`block`), a whole model (`recipe`).

The package can be called: `transformers_quip.quantize(source, out, config)` is `hf.stream.quantize`.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any


class _Callable(types.ModuleType):
    """A module that is a function, too: the function and the package have one name."""

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """Quantize a model from folder to folder; see `transformers_quip.hf.stream.quantize`."""
        return importlib.import_module("transformers_quip.hf.stream").quantize(*arguments, **keywords)


sys.modules[__name__].__class__ = _Callable
