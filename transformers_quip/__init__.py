"""QuIP# for Hugging Face Transformers.

Importing this makes `quantization_config=QuipConfig(...)` and the models that were saved with it work. It is as cheap as
`import transformers`: PyTorch is imported when one of the names below is first used, or a model is loaded.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import logs
from .hf import registration
from .version import __version__

if TYPE_CHECKING:
    from .config import QuipConfig
    from .hf.quantizer import QuipQuantizer
    from .nn import QuipLinear
    from .ops.backend import set_activations, set_backend

__all__ = ["QuipConfig", "QuipLinear", "QuipQuantizer", "__version__", "set_activations", "set_backend"]

_HOMES = {
    "QuipConfig": "config",
    "QuipLinear": "nn",
    "QuipQuantizer": "hf.quantizer",
    "set_activations": "ops.backend",
    "set_backend": "ops.backend",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    importlib.import_module(registration.WAITED_FOR)  # who uses one of these means Transformers to know the method
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


logs.configure()
registration.register()
