"""The plugin of vLLM: models that were saved by this package are served without a flag.

vLLM imports this package in each of its processes, by the entry point `vllm.general_plugins`. Nothing else imports it.
"""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)

# Interfaces of vLLM that this package uses are the same in these versions.
OLDEST, BEFORE = (0, 31), (0, 34)


def register() -> None:
    """Make the quantization method "quip" known to vLLM. It may be called more than once in a process."""
    import vllm
    from vllm.model_executor.layers.quantization import register_quantization_config

    from .config import Exl3VllmConfig, QuipVllmConfig

    version = tuple(int(part) for part in vllm.__version__.split(".")[:2] if part.isdecimal())
    if not OLDEST <= version < BEFORE:
        logger.warning(
            "transformers-quip supports vLLM 0.31 to 0.33, and this is %s: quantized models may not load", vllm.__version__
        )
    for method, config in (("quip", QuipVllmConfig), ("exl3", Exl3VllmConfig)):
        register_quantization_config(method)(config)
