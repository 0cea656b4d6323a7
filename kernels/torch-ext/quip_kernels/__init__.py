"""Fast kernels of transformers-quip. They work on plain tensors and do not depend on the rest of the project.

`cpu` is the compiled library for CPUs. `layout` (with its forms `e8p` and `e8`) defines how codes are stored on GPUs.
`gpu` has the Triton kernels that read them; it is imported on first use, because it needs the package `triton`.
"""

from __future__ import annotations

import importlib
from types import ModuleType

_SUBMODULES = ("cpu", "e8", "e8p", "gpu", "layout")


def __getattr__(name: str) -> ModuleType:
    if name in _SUBMODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
