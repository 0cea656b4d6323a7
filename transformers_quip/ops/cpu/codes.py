"""The codes of a layer as the CPU library takes them: one class for each family of kernels, with the same methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from quip_kernels import cpu_linear, cpu_nibbles, cpu_records, cpu_trellis
from quip_kernels.cpu_library import default_level, loaded

from ... import codebooks
from .. import packing
from ..layer import Layer, integer_dtypes, named

Vectors = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]  # su, sv, bias
Transforms = tuple[cpu_linear.Transform | None, cpu_linear.Transform | None]  # of inputs and outputs

# The types of expanded codes by those of stored ones, by the family of kernels.
_EXPANDED: Mapping[str, Mapping[torch.dtype, torch.dtype]] = {
    "e8p": cpu_nibbles.DTYPES,
    "trellis": {torch.int16: torch.int8},
}


class Call(NamedTuple):
    """A call of the library: function(address, x, y, number of vectors, *arguments, threads), which returns 0."""

    function: Callable[..., int]
    address: int
    arguments: tuple[int, ...]
    keep: object  # keeps alive the description at the address, and the objects that it points to


class E8PCodes:
    """E8P codes or nibbles, of one or two stages.

    Args:
        planes: bytes of an activation.
    """

    def __init__(self, layer: Layer, planes: int):
        weight = layer.weight
        self.codes, self.second = weight[0], weight[1] if len(weight) > 1 else None
        self.scale = layer.book.residual_scale or 1.0
        self.planes = planes

    def multiply(self, x: torch.Tensor, vectors: Vectors, transforms: Transforms) -> torch.Tensor:
        """The layer for few vectors; a part that is None is left out."""
        return cpu_linear.linear(x, self.codes, *vectors, *transforms, self.planes, None, None, self.second, self.scale)

    def decode(self, rows: slice, out: torch.Tensor) -> torch.Tensor:
        """Some rows of the weight, written to `out`."""
        second = None if self.second is None else _rows_of(self.second, rows)
        return cpu_linear.decode(_rows_of(self.codes, rows), out.shape[1], out.dtype, None, out, second, self.scale)

    def describe(self, n: int, vectors: Vectors, transforms: Transforms) -> tuple[Any, int]:
        """The layer's description for the library, which must be kept alive, and its address."""
        su, sv, bias = map(cpu_linear.contiguous, vectors)
        tensors = (cpu_linear.contiguous(self.codes), cpu_linear.contiguous(self.second), su, sv, bias)
        description, address = cpu_linear.layer_of(n, tensors, *transforms, self.scale)
        return (description, tensors), address

    def call(self, n: int, dtype: torch.dtype, vectors: Vectors, transforms: Transforms) -> Call:
        """The call that [`multiply`] makes for contiguous vectors of this dtype."""
        (keep, _), address = self.describe(n, vectors, transforms)
        kind = cpu_linear.DTYPES[dtype]
        arguments = (n, kind, kind, self.planes, default_level())
        return Call(loaded().quip_linear, address, arguments, (keep, transforms))


def _rows_of(codes: torch.Tensor, rows: slice) -> torch.Tensor:
    """Rows of codes, or of nibbles or records: then they begin and end with a tile."""
    if cpu_nibbles.is_nibbles(codes) or cpu_records.is_records(codes):
        return codes[rows.start // cpu_nibbles.TILE : rows.stop // cpu_nibbles.TILE]
    return codes[rows]


class TrellisCodes:
    """Trellis codes or records. Between the transforms activations are float32, whatever their dtype is outside.

    Args:
        planes: bytes of an activation that are wanted. With one, the bytes of records are multiplied, else the codes.
    """

    def __init__(self, layer: Layer, planes: int):
        self.layout, self.exact = packing.trellis_layout(layer.codebook), planes != 1
        self.made: Sequence[torch.Tensor] = ()
        self.table: torch.Tensor | None
        if packing.is_records(layer.weight):
            self.codes, self.table = layer.weight[0], layer.weight[1][0] if len(layer.weight) > 1 else None
            return
        weight = layer.weight
        if packing.is_expanded(weight):
            weight = self.made = packing.stored(weight, layer.codebook, layer.n)
        tensors = named(weight, layer.book, layer.m, layer.n)
        self.codes, self.table = tensors["codes"], tensors.get("table")

    def multiply(self, x: torch.Tensor, vectors: Vectors, transforms: Transforms) -> torch.Tensor:
        """See [`E8PCodes.multiply`]."""
        return cpu_trellis.linear(x, self.codes, *vectors, *transforms, self.layout, self.table, None, self.exact)

    def decode(self, rows: slice, out: torch.Tensor) -> torch.Tensor:
        """See [`E8PCodes.decode`]."""
        codes = _rows_of(self.codes, rows)
        return cpu_trellis.decode(codes, out.shape[1], out.dtype, self.layout, self.table, out=out)

    def call(self, n: int, dtype: torch.dtype, vectors: Vectors, transforms: Transforms) -> Call:
        """See [`E8PCodes.call`]."""
        tensors = (self.codes, *vectors, self.table)
        keep, address = cpu_trellis.layer_of(n, tensors, *transforms, self.layout, self.exact)
        kind = cpu_linear.DTYPES[dtype]
        arguments = (n, kind, kind, default_level())
        return Call(loaded().quip_trellis_linear, address, arguments, (keep, transforms, self.made))


def codes_of(layer: Layer, planes: int) -> E8PCodes | TrellisCodes:
    """The codes of a layer whose codebook has kernels in the library."""
    return TrellisCodes(layer, planes) if layer.book.kernels == "trellis" else E8PCodes(layer, planes)


def dtypes_are_known(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether the library takes the types of all of these that are floating point."""
    return all(v.dtype in cpu_linear.DTYPES or not v.is_floating_point() for v in tensors)


def types_fit(codebook: str, weight: Sequence[torch.dtype | None], vectors: Sequence[torch.dtype | None]) -> bool:
    """Whether a layer's tensors have the types that its codebook stores and the library takes.

    Args:
        weight: of the stored tensors. vectors: of su, sv and the bias; None where there is none.
    """
    known, wanted = cpu_linear.DTYPES, integer_dtypes(codebook)
    expanded = _EXPANDED.get(codebooks.get(codebook).kernels or "", {})
    if len(weight) != len(wanted) or not all(dtype is None or dtype in known for dtype in vectors):
        return False
    pairs = zip(weight, wanted, strict=True)
    return all(a in known if b is None else a is b or a is expanded.get(b) for a, b in pairs)
