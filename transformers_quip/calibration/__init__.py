"""Calibration: token ids, the blocks' inputs, and the Hessians of the linears that read them."""

from .capture import BlockCall, BlockInputs, capture_inputs, find_blocks, linear_names
from .hessian import CrossMomentAccumulator, HessianAccumulator
from .observe import LinearObserver, observe_linears

__all__ = [
    "BlockCall",
    "BlockInputs",
    "CrossMomentAccumulator",
    "HessianAccumulator",
    "LinearObserver",
    "capture_inputs",
    "find_blocks",
    "linear_names",
    "observe_linears",
]
