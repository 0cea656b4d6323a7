"""Quality and size of a quantized model: perplexity, divergence, bytes, and pictures of the errors."""

from .divergence import Divergence, divergence
from .generation import Generation, Written, generation_quality, judge, repeated_share, write
from .html_report import write_report
from .kept import KeptPredictions, keep_predictions
from .perplexity import perplexity
from .report import LayerRecord, mean_by_kind, plot_relative_error
from .size import LinearSize, linear_sizes, safetensors_bytes, true_bits_per_weight
from .speed import Speed, generation_speed
from .windows import check_source, evaluation_windows

__all__ = [
    "Divergence",
    "Generation",
    "KeptPredictions",
    "LayerRecord",
    "LinearSize",
    "Speed",
    "Written",
    "check_source",
    "divergence",
    "evaluation_windows",
    "generation_quality",
    "generation_speed",
    "judge",
    "keep_predictions",
    "linear_sizes",
    "mean_by_kind",
    "perplexity",
    "plot_relative_error",
    "repeated_share",
    "safetensors_bytes",
    "true_bits_per_weight",
    "write",
    "write_report",
]
