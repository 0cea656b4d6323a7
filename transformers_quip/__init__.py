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
    from . import quantize
    from .config import QuipConfig
    from .hf.patches import restore as restore_transformers
    from .hf.quantizer import QuipQuantizer
    from .nn import QuipLinear
    from .ops.backend import set_activations, set_backend, set_memory

__all__ = [
    "QuipConfig",
    "QuipLinear",
    "QuipQuantizer",
    "__version__",
    "quantize",
    "restore_transformers",
    "set_activations",
    "set_backend",
    "set_memory",
]

# Public name → the module that has it, and its name there; "" for a package that can be called.
_HOMES = {
    "QuipConfig": ("config", "QuipConfig"),
    "QuipLinear": ("nn", "QuipLinear"),
    "QuipQuantizer": ("hf.quantizer", "QuipQuantizer"),
    "quantize": ("quantize", ""),
    "restore_transformers": ("hf.patches", "restore"),
    "set_activations": ("ops.backend", "set_activations"),
    "set_backend": ("ops.backend", "set_backend"),
    "set_memory": ("ops.backend", "set_memory"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    value: Any = importlib.import_module(f"{__name__}.{module}")
    if attribute:
        value = getattr(value, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


logs.configure()
registration.register()
