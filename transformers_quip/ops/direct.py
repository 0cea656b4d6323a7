"""The shortest way to the CPU library, for calls that nothing but the computation is interested in.

PyTorch's dispatcher takes longer to call an op written in Python than the library takes to compute a small layer, and a
model makes some two hundred such calls for each token.
"""

from __future__ import annotations

import torch

from . import cpu


def linear(x: torch.Tensor, codes: torch.Tensor, *arguments) -> torch.Tensor:
    """What torch.ops.quip.linear returns, without a graph for derivatives."""
    if type(x) is torch.Tensor and x.is_cpu and codes.is_cpu and not _is_watched():
        return cpu.eager_linear(x, codes, *arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.quip.linear(x, codes, *arguments)


def _is_watched() -> bool:
    """Whether a dispatch mode, a function transform (vmap, grad) or the profiler has to see each op."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd._profiler_enabled()
    )
