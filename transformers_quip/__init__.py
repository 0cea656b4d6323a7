"""QuIP# for Hugging Face Transformers.

Importing this makes `quantization_config=QuipConfig(...)` and the models that were saved with it work.
"""

from . import logs
from .config import QuipConfig
from .nn import QuipLinear
from .ops.backend import set_activations, set_backend
from .quantizer import QuipQuantizer, register
from .version import __version__

__all__ = ["QuipConfig", "QuipLinear", "QuipQuantizer", "__version__", "set_activations", "set_backend"]

logs.configure()
register()
