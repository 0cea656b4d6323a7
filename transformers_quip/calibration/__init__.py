"""Calibration: token ids, the blocks' inputs, and the Hessians of the linears that read them."""

from .blocks import find_block_lists, find_blocks
from .capture import (
    BlockInputs,
    CapturedInputs,
    capture_inputs,
    linear_names,
    run_after_blocks,
)
from .dataset import load_token_ids
from .hessian import BlockHessians, HessianAccumulator
from .observe import LinearObserver, observe_linears
from .recorder import BlockCall, NotBlockByBlock
from .synthetic import write_text

__all__ = [
    "BlockCall",
    "BlockHessians",
    "BlockInputs",
    "CapturedInputs",
    "HessianAccumulator",
    "LinearObserver",
    "NotBlockByBlock",
    "capture_inputs",
    "find_block_lists",
    "find_blocks",
    "linear_names",
    "load_token_ids",
    "observe_linears",
    "run_after_blocks",
    "write_text",
]
