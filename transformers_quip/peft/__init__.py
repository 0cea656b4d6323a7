"""LoRA adapters of PEFT on a quantized model: begin with the error of quantization, and merge by rounding again."""

from .initialize import residual_init
from .merge import MergeReport, merge_and_requantize

__all__ = ["MergeReport", "merge_and_requantize", "residual_init"]
