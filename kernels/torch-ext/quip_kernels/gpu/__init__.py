"""The kernels in Triton, for CUDA, ROCm and XPU devices; importing this needs the package `triton`.

`decode` (words of codes to weights) and `dot` (products) are the building blocks. `transform`, `quantize`, `matvec`,
`small_batch`, `dequantize` and `trellis` have one or two kernels each, with the functions that launch them. `tune` chooses
the fastest launch parameters. `viterbi` encodes weights as trellis codes.
"""

from . import dequantize, matvec, quantize, small_batch, transform, trellis, tune, viterbi

__all__ = ["dequantize", "matvec", "quantize", "small_batch", "transform", "trellis", "tune", "viterbi"]
