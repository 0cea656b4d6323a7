"""Register the package with Transformers when it is needed, and not earlier.

`import transformers` costs little because it is lazy: PyTorch and the code that loads models are imported when a model is
asked for. Importing this package must not spoil that, nor make the command line wait. So an import finder waits
until Transformers imports its registry of quantization methods, or its code that loads models, and acts right after that.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from _thread import get_ident
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Module of Transformers → the module and function here that are called after its import.
_CALLED_AFTER = {
    "transformers.quantizers.auto": (f"{__package__}.methods", "register"),
    "transformers.modeling_utils": (f"{__package__}.patches", "install_on_import"),
}


def register() -> None:
    """Register now where Transformers has imported its part already, and otherwise right after it does.

    Raises:
        ImportError: another package has taken the name "quip" (raised by the import that is waited for, if that is later).
    """
    # A second import of this package, after its modules were dropped, finds the first one's finder.
    sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__qualname__ != Waiting.__qualname__]
    later = {name for name in _CALLED_AFTER if name not in sys.modules}
    if later:
        sys.meta_path.insert(0, Waiting(later))
    for name in _CALLED_AFTER.keys() - later:
        _call_after(name)


def _call_after(name: str) -> None:
    module, function = _CALLED_AFTER[name]
    getattr(importlib.import_module(module), function)()


class Waiting:
    """Finds the awaited modules by asking the other finders, and acts when one has been executed.

    A module that was only looked for, as `importlib.util.find_spec` does, is awaited still.
    """

    def __init__(self, names: set[str]):
        self._names = set(names)
        self._asking: set[tuple[str, int]] = set()  # names and threads

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of an awaited module, with a loader that acts; None for any other module."""
        asking = (name, get_ident())
        if name not in self._names or asking in self._asking:
            return None
        self._asking.add(asking)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._asking.remove(asking)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenAct(spec.loader, self)  # type: ignore[assignment] # importlib.abc takes 6 ms to import
        return spec

    def has_come(self, name: str) -> None:
        """An awaited module has been executed: act."""
        self._names.discard(name)
        if not self._names and self in sys.meta_path:
            sys.meta_path.remove(self)
        _call_after(name)


class _ThenAct:
    """The module's own loader, and then the call that waits for it."""

    def __init__(self, loader: Any, waiting: Waiting):
        self._loader = loader
        self._waiting = waiting

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader  # leaves no trace afterwards
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._waiting.has_come(module.__name__)
