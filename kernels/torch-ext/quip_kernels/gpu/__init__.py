"""The kernels in Triton, for CUDA, ROCm and XPU devices; importing this needs the package `triton`.

`decode` (codes to weights) and `dot` (products) are the building blocks. `transform`, `quantize`, `matvec`,
`small_batch`, `dequantize`, `grouped` (experts of a mixture) and `trellis` have one or two kernels each, with the functions
that launch them. `tune` chooses the fastest launch parameters. `viterbi` encodes weights as trellis codes,
`nearest` with lattices and scalar grids.
"""

from . import dequantize, grouped, matvec, nearest, quantize, small_batch, transform, trellis, tune, viterbi

__all__ = [
    "dequantize",
    "grouped",
    "matvec",
    "nearest",
    "quantize",
    "small_batch",
    "transform",
    "trellis",
    "tune",
    "viterbi",
]
