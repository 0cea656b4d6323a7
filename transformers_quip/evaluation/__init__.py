"""Quality and size of a quantized model: perplexity, divergence, bytes, and pictures of the errors."""

from .divergence import Divergence, divergence
from .html_report import write_report
from .perplexity import perplexity
from .report import LayerRecord, mean_by_kind, plot_relative_error
from .size import LinearSize, linear_sizes, safetensors_bytes, true_bits_per_weight
from .speed import Speed, generation_speed
from .windows import check_source, evaluation_windows

__all__ = [
    "Divergence",
    "LayerRecord",
    "LinearSize",
    "Speed",
    "check_source",
    "divergence",
    "evaluation_windows",
    "generation_speed",
    "linear_sizes",
    "mean_by_kind",
    "perplexity",
    "plot_relative_error",
    "safetensors_bytes",
    "true_bits_per_weight",
    "write_report",
]
