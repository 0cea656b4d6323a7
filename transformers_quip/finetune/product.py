"""Matrix products with a frozen weight, in the fastest type of the device, with the gradient of the input alone."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch

# Size of the product that is timed: a layer of a small model, and a prompt.
_TOKENS, _FEATURES = 256, 512


class FrozenProduct(torch.autograd.Function):
    """x Wᵀ for a weight without a gradient, computed in the weight's dtype.

    The backward pass is one product with W; nothing but W is kept for it. `F.linear` would keep x as well, and would let
    autocast decide the dtype.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x [..., n] in any floating dtype, weight [m, n] → [..., m] in the dtype of x."""
        ctx.save_for_backward(weight)
        return torch.nn.functional.linear(x.to(weight.dtype), weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The gradient with respect to x, in its dtype."""
        (weight,) = ctx.saved_tensors
        return (gradient.to(weight.dtype) @ weight).to(gradient.dtype), None


class DecodedProduct(torch.autograd.Function):
    """[`FrozenProduct`] with a weight that is decoded for each pass, and kept in neither."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, decode: Callable[[], torch.Tensor]) -> torch.Tensor:
        """x [..., n] in any floating dtype; `decode` gives the weight [m, n] → [..., m] in the dtype of x."""
        ctx.decode = decode
        weight = decode()
        return torch.nn.functional.linear(x.to(weight.dtype), weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The gradient with respect to x, in its dtype."""
        weight = ctx.decode()
        return (gradient.to(weight.dtype) @ weight).to(gradient.dtype), None


@functools.lru_cache(maxsize=8)
def product_dtype(device: torch.device) -> torch.dtype:
    """The dtype of matrix products while a model is tuned: bfloat16 where it is the faster one, else float32.

    On GPUs that is bfloat16 where the device supports it. On CPUs it depends on the processor: with AVX512-BF16 or AMX
    bfloat16 is two to four times as fast as float32, without them up to ten times as slow. So one product of each is timed.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    if device.type != "cpu":
        return torch.bfloat16
    return torch.bfloat16 if _seconds(torch.bfloat16) < _seconds(torch.float32) else torch.float32


def _seconds(dtype: torch.dtype) -> float:
    """The shortest of a few timings of one product."""
    x, weight = torch.ones(_TOKENS, _FEATURES, dtype=dtype), torch.ones(_FEATURES, _FEATURES, dtype=dtype)
    found = []
    for _ in range(5):
        started = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        found.append(time.perf_counter() - started)
    return min(found)
