"""Which kernel computes a layer on the CPU: the one place that decides, a pure function of a [`Case`]."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

import torch

from quip_kernels.cpu_linear import DTYPES, MOST_FEATURES
from quip_kernels.cpu_many import WHOLE


class Route(Enum):
    """How a layer is computed."""

    REFERENCE = "plain PyTorch"
    FUSED = "one call of the library, transforms included; the codes are multiplied"
    PRODUCTS = "the codes are multiplied by the library; PyTorch applies a transform that the library lacks"
    BUNDLED = "one call of the library for many vectors, on a processor with AMX"
    DECODED = "matrix products with decoded rows of the weight"


# The batch size up to which multiplying by the codes is faster than the route for more, by the bytes of an activation.
# e8p: decoding and a matrix product (1536x576 and 2048x2048 with AVX-512; the product is faster in bfloat16).
# bundled: BUNDLED (crossover measured on 576x576, where it is higher, to 5632x2048, where it is lower; a compromise).
MOST_VECTORS: dict[str, dict[int, int]] = {
    "e8p": {3: 64, 2: 40, 1: 64},
    "bundled": {2: 20, 1: 24},
    "trellis": {3: 16, 2: 16, 1: 16},
    # the same with AVX2 and records of bytes, which more than one byte of an activation does not use
    "records": {3: 16, 2: 16, 1: 64},
}


class Case(NamedTuple):
    """Everything that the route of a layer depends on.

    Attributes:
        kernels: the family of its codebook ("e8p", "trellis"), or None.
        stages: the number of tensors that the codebook stores.
        dtype: of the activations.
        m, n: outputs and inputs.
        planes: bytes of an activation when codes are multiplied ([`planes`]).
        tensors_fit: whether the layer's tensors have the types that the codebook and the library need.
        has_transforms: whether the library has both transforms.
        is_usable: whether the library is available and may be used.
        has_amx: whether the processor has AMX and the library has kernels for it.
        is_expanded: whether its codes are in the expanded form (`packing`).
    """

    kernels: str | None
    stages: int
    dtype: torch.dtype
    m: int
    n: int
    planes: int
    tensors_fit: bool = True
    has_transforms: bool = True
    is_usable: bool = True
    has_amx: bool = False
    is_expanded: bool = False


class Routes(NamedTuple):
    """The route for up to `most` vectors, and the route for more."""

    few: Route
    most: int
    many: Route

    def of(self, vectors: int) -> Route:
        """The route for this number of vectors."""
        if vectors == 0:
            return Route.REFERENCE
        return self.few if vectors <= self.most else self.many


def routes(case: Case) -> Routes:
    """The routes of a layer, by the number of vectors."""
    if case.kernels is None or not case.is_usable or not case.tensors_fit or case.dtype not in DTYPES:
        return Routes(Route.REFERENCE, 0, Route.REFERENCE)
    few = Route.FUSED if case.has_transforms else Route.PRODUCTS
    if case.kernels == "trellis":
        return Routes(few, MOST_VECTORS["records" if case.is_expanded else "trellis"][case.planes], Route.DECODED)
    if case.n > MOST_FEATURES:
        return Routes(Route.REFERENCE, 0, Route.REFERENCE)
    most = MOST_VECTORS["e8p"][case.planes]
    if _is_bundled(case):
        return Routes(few, min(most, MOST_VECTORS["bundled"][case.planes]), Route.BUNDLED)
    return Routes(few, most, Route.DECODED)


def planes(dtype: torch.dtype, activations: str) -> int:
    """Bytes in which activations of this dtype are multiplied: "exact" keeps more bits than the dtype has."""
    if activations == "int8" or (activations == "auto" and dtype != torch.float32):
        return 1
    return 3 if dtype == torch.float32 else 2


def is_int8(case: Case) -> bool:
    """Whether BUNDLED multiplies in 8 bits, which it does for codes of one stage."""
    return case.planes == 1 and case.stages == 1


def _is_bundled(case: Case) -> bool:
    whole = case.m % WHOLE == 0 and case.n % WHOLE == 0
    fits = case.dtype == torch.bfloat16 or (case.dtype == torch.float16 and is_int8(case))
    return case.has_amx and case.has_transforms and whole and fits
