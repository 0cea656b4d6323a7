"""Which Triton kernel computes a layer on a GPU: the one place that decides, a pure function of its arguments."""

from __future__ import annotations

from collections.abc import Collection
from enum import Enum

import torch


class Family(Enum):
    """Kernels that are right or wrong together: the unit in which a device is trusted (`self_check`)."""

    TRANSFORM = "transform"
    MATVEC = "matvec"
    SMALL_BATCH = "small batch"
    DEQUANTIZE = "dequantize"
    TRELLIS = "trellis"
    GROUPED = "grouped"


class Encoder(Enum):
    """Kernels that encode weights. They are trusted all together, and tried when the first weight is encoded."""

    TRELLIS = "paths of trellis codes"
    POINTS = "nearest points of e8p"
    PANELS = "panels of e8p"
    PANELS_3 = "panels of e8p-rvq3"
    PANELS_4 = "panels of e8p-rvq4"
    GRID = "panels of scalar3"


class Route(Enum):
    """How a layer is computed: the form of the rotated inputs, and the product with the weight."""

    REFERENCE = "plain PyTorch"
    DIGITS = "integers of 8-bit digits; the codes are decoded once for all vectors and multiplied"
    HALVES = "float16 with a scale for each vector, two terms for float32; tensor cores decode as they multiply"
    TRELLIS = "float32; trellis codes are decoded and multiplied"
    DENSE_HALF = "float16 with a scale for each vector; a matrix product with the decoded weight"
    DENSE_SINGLE = "float32; a matrix product with the decoded weight"


ALL = frozenset(Family)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# The largest batch size of each route; above the last, a dense weight and a matrix product.
MOST_VECTORS = {
    "e8p": ((Route.DIGITS, 4), (Route.HALVES, 64)),
    "trellis": ((Route.TRELLIS, 8),),
}


def route(kernels: str | None, dtype: torch.dtype, vectors: int, trusted: Collection[Family] = ALL) -> Route:
    """How a layer is computed.

    Args:
        kernels: the kernels of its codebook ("e8p", "trellis"), or None.
        dtype: of the activations.
        vectors: their number.
        trusted: the families that may compute on the device.
    """
    if kernels is None or dtype not in DTYPES or vectors == 0:
        return Route.REFERENCE
    dense = Route.DENSE_SINGLE if dtype == torch.float32 else Route.DENSE_HALF
    way = next((way for way, most in MOST_VECTORS[kernels] if vectors <= most), dense)
    return way if needed(way, kernels) in trusted else Route.REFERENCE


def needed(way: Route, kernels: str) -> Family:
    """The family of the product of a route; its transforms are another, without which PyTorch computes them."""
    if kernels == "trellis":
        return Family.TRELLIS
    return {Route.DIGITS: Family.MATVEC, Route.HALVES: Family.SMALL_BATCH}.get(way, Family.DEQUANTIZE)


def digits(dtype: torch.dtype, activations: str) -> int:
    """Bytes of an activation in DIGITS."""
    return 1 if activations == "int8" else 3 if dtype == torch.float32 else 2
