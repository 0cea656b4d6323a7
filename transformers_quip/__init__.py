"""QuIP# for Hugging Face Transformers.

Importing this makes `quantization_config=QuipConfig(...)` and the models that were saved with it work.
"""

from . import logs
from .config import QuipConfig
from .nn import QuipLinear
from .quantizer import QuipQuantizer, register
from .version import __version__

__all__ = ["QuipConfig", "QuipLinear", "QuipQuantizer", "__version__"]

logs.configure()
register()
