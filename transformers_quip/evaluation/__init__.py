"""What a quantized model costs and what it lost: perplexity, size, and pictures of the errors."""

from .perplexity import perplexity
from .report import LayerRecord, mean_by_kind, plot_relative_error
from .size import LinearSize, linear_sizes, safetensors_bytes, true_bits_per_weight

__all__ = [
    "LayerRecord",
    "LinearSize",
    "linear_sizes",
    "mean_by_kind",
    "perplexity",
    "plot_relative_error",
    "safetensors_bytes",
    "true_bits_per_weight",
]
