"""Quality and size of a quantized model: perplexity, divergence, bytes, and pictures of the errors."""

from .divergence import Divergence, divergence
from .generation import Generation, generation_quality, repeated_share
from .html_report import write_report
from .perplexity import perplexity
from .report import LayerRecord, mean_by_kind, plot_relative_error
from .size import LinearSize, linear_sizes, safetensors_bytes, true_bits_per_weight
from .speed import Speed, generation_speed
from .windows import check_source, evaluation_windows

__all__ = [
    "Divergence",
    "Generation",
    "LayerRecord",
    "LinearSize",
    "Speed",
    "check_source",
    "divergence",
    "evaluation_windows",
    "generation_quality",
    "generation_speed",
    "linear_sizes",
    "mean_by_kind",
    "perplexity",
    "plot_relative_error",
    "repeated_share",
    "safetensors_bytes",
    "true_bits_per_weight",
    "write_report",
]
