"""The quantization methods that Transformers' registry gets from this package.

This file is imported while Transformers itself is being imported, so its first lines import nothing that may be incomplete.
"""

from __future__ import annotations

import logging
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from ..checkpoints.foreign.plan import METHODS
from ..config import QUANT_METHOD, QuipConfig

logger = logging.getLogger(__name__)


class ForeignConfig(QuantizationConfigMixin):
    """The class for the quantization_config of a foreign checkpoint: it makes a `QuipConfig` that carries it along."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The config with which the checkpoint is loaded; its native one is known when its files have been seen."""
        config = QuipConfig(dataset=None)
        config.foreign = dict(config_dict)
        return (config, kwargs) if return_unused_kwargs else config


def register() -> None:
    """Make "quip" known to Transformers, and the checkpoints of other packages that can be loaded.

    A second import of this package replaces the first one's classes. Nothing happens while `quantizer` is being imported,
    because its first lines import the registry: its last line calls this function again.

    Raises:
        ImportError: another package has taken the name "quip".
    """
    from transformers.quantizers.auto import (
        AUTO_QUANTIZATION_CONFIG_MAPPING,
        AUTO_QUANTIZER_MAPPING,
        register_quantization_config,
        register_quantizer,
    )

    from . import quantizer

    if not hasattr(quantizer, "QuipQuantizer"):
        return
    for method, config, others in ((QUANT_METHOD, QuipConfig, False), *((name, ForeignConfig, True) for name in METHODS)):
        for mapping, kind, add in (
            (AUTO_QUANTIZATION_CONFIG_MAPPING, config, register_quantization_config),
            (AUTO_QUANTIZER_MAPPING, quantizer.QuipQuantizer, register_quantizer),
        ):
            known = mapping.get(method)
            if known is None:
                add(method)(kind)
            elif (known.__module__, known.__qualname__) == (kind.__module__, kind.__qualname__):
                mapping[method] = kind
            elif others:
                logger.warning(
                    f"Checkpoints of quantization method {method!r} are loaded by {known.__module__}.{known.__qualname__}, "
                    "which was registered first, and not by transformers-quip; from_pretrained(…, "
                    "quantization_config=QuipConfig()) loads them by transformers-quip"
                )
                break
            else:
                raise ImportError(
                    f"the quantization method {method!r} is taken by {known.__module__}.{known.__qualname__}: "
                    "transformers-quip cannot be used together with it"
                )
