"""Registers the package with Transformers at the moment when that matters, and not before.

`import transformers` costs little because it is lazy; PyTorch and the code that loads models are imported when a model is
asked for. Importing this package must not spoil that, nor make the command line wait. So if that code is not imported
yet, a finder waits for its import and registers right after it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

WAITED_FOR = "transformers.modeling_utils"
_QUANTIZER = f"{__package__}.quantizer"


def register() -> None:
    """Register now if Transformers can load models already, else as soon as it can.

    Raises:
        ImportError: another package has taken the name (raised by the import that is waited for, if that is later).
    """
    # A second import of this package, after its modules were dropped, finds the first one's finder.
    sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__qualname__ != Waiting.__qualname__]
    if WAITED_FOR in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, Waiting())


def _register() -> None:
    importlib.import_module(_QUANTIZER).register()


class Waiting:
    """A finder that finds one module, by asking the others, and registers when that has been executed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of the module that is waited for, with a loader that registers; None for any other."""
        if name != WAITED_FOR:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)  # type: ignore[assignment] # has what a loader must have
        return spec


class _ThenRegister:
    """The module's own loader, and `_register` after it."""

    def __init__(self, loader: Any):
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader  # nothing of this shows afterwards
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _register()
