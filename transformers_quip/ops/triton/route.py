"""Which Triton kernel computes a layer on a GPU: the one place that decides, a pure function of its arguments."""

from __future__ import annotations

from enum import Enum

import torch


class Route(Enum):
    """How a layer is computed: the form of the rotated inputs, and the product with the weight."""

    REFERENCE = "plain PyTorch"
    DIGITS = "integers of 8-bit digits; the codes are decoded once for all vectors and multiplied"
    HALVES = "float16 with a scale for each vector, two terms for float32; tensor cores decode as they multiply"
    TRELLIS = "float32; trellis codes are decoded and multiplied"
    DENSE_HALF = "float16 with a scale for each vector; a matrix product with the decoded weight"
    DENSE_SINGLE = "float32; a matrix product with the decoded weight"


DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# The largest batch size of each route; above the last, a dense weight and a matrix product.
MOST_VECTORS = {
    "e8p": ((Route.DIGITS, 4), (Route.HALVES, 64)),
    "trellis": ((Route.TRELLIS, 8),),
}


def route(kernels: str | None, dtype: torch.dtype, vectors: int, is_chosen: bool = True) -> Route:
    """How a layer is computed.

    Args:
        kernels: the family of its codebook ("e8p", "trellis"), or None.
        dtype: of the activations.
        vectors: their number.
        is_chosen: whether Triton kernels compute on the device (`backend.for_device`).
    """
    if not is_chosen or kernels is None or dtype not in DTYPES or vectors == 0:
        return Route.REFERENCE
    for way, most in MOST_VECTORS[kernels]:
        if vectors <= most:
            return way
    return Route.DENSE_SINGLE if dtype == torch.float32 else Route.DENSE_HALF


def digits(dtype: torch.dtype, activations: str) -> int:
    """Bytes of an activation in DIGITS."""
    return 1 if activations == "int8" else 3 if dtype == torch.float32 else 2
