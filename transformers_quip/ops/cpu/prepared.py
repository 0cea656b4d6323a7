"""The shortest way to the CPU library: the fast path for plain eager calls, which bypasses PyTorch's dispatcher.

PyTorch's dispatcher takes longer to call an op written in Python than the library takes to compute a small layer, and a
model makes some two hundred such calls for each token. So the route, the arguments and the checks are looked up once for
each layer; later calls only check that nothing changed.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from .. import backend
from ..layer import Layer
from . import run, torch_private
from .codes import Call, codes_of
from .route import Route, Routes, is_int8


def needs_graph(x: torch.Tensor, tensors: Iterable[torch.Tensor | None]) -> bool:
    """Whether a call with this input and these tensors of a layer builds a graph for derivatives where gradients are on.

    Forward-mode differentiation is seen by `torch_private.is_recorded`.
    """
    return x.requires_grad or any(v is not None and v.requires_grad for v in tensors)


def linear(x: torch.Tensor, layer: Layer) -> torch.Tensor:
    """The result of torch.ops.quip.linear, without a graph for derivatives unless somebody records operations."""
    if torch_private.is_recorded():
        return torch.ops.quip.linear(x, *layer)
    if type(x) is torch.Tensor and x.is_cpu and layer.weight[0].is_cpu and not torch_private.is_watched():
        return run.linear(x, *layer)
    with torch_private.below_autograd():
        return torch.ops.quip.linear(x, *layer)


@dataclass(slots=True)
class Prepared:
    """A layer for vectors of one dtype: all that stays the same from call to call.

    It holds no tensor. It is valid for the tensors that it was made with, as long as their addresses do not change. An
    in-place change of their values takes effect as it should.
    """

    present: tuple[tuple[str, weakref.ref[torch.Tensor], int, torch.dtype], ...]
    absent: tuple[str, ...]
    settings: backend.Settings
    dtype: torch.dtype
    m: int
    n: int
    routes: Routes
    call: Call
    bundles: tuple  # the arguments of `run.bundled`, for a layer whose route for many vectors is BUNDLED

    def __call__(self, x: torch.Tensor, tensors: Mapping[str, torch.Tensor | None]) -> torch.Tensor | None:
        """The layer's output, or None if it has to be prepared again.

        Args:
            x: [..., n]. tensors: by name, the layer's, and possibly others.
        """
        n, shape = self.n, x.shape
        count = x.numel() // n
        if (
            type(x) is not torch.Tensor
            or x.dtype is not self.dtype
            or count == 0
            or shape[-1] != n
            or not x.is_cpu
            or not x.is_contiguous()
            or backend.settings() is not self.settings
            or (torch.is_grad_enabled() and needs_graph(x, tensors.values()))
            or torch_private.is_watched()
        ):
            return None
        for name, known, address, dtype in self.present:
            v = tensors[name]
            if v is None or v is not known() or v.data_ptr() != address or v.dtype is not dtype:
                return None
        for name in self.absent:
            if tensors[name] is not None:
                return None
        if count > self.routes.most:
            if self.routes.many is not Route.BUNDLED:
                return None
            su, sv = tensors["su"], tensors["sv"]
            if su is None or sv is None:
                return None
            return run.bundled(x, x, su, sv, self.call.address, self.m, *self.bundles)
        y = x.new_empty((*shape[:-1], self.m))
        function, start, arguments, _ = self.call
        if function(start, x.data_ptr(), y.data_ptr(), count, *arguments, torch.get_num_threads()):
            raise MemoryError(f"no memory for {count} vectors of {n} inputs and {self.m} outputs")
        return y


def prepare(
    x: torch.Tensor, tensors: Mapping[str, torch.Tensor | None], names: Sequence[str], layer: Layer
) -> Prepared | None:
    """An object that computes further inputs like x; None if one call of the library cannot.

    Args:
        x: [..., n].
        tensors: by name, all of the layer's.
        names: of its stored tensors, in their order.
        layer: the same tensors.
    """
    if type(x) is not torch.Tensor or not x.is_cpu or torch_private.is_watched():
        return None
    watched = {name: tensors[name] for name in (*names, "su", "sv", "bias")}
    if not all(v is None or (v.is_cpu and v.is_contiguous()) for v in watched.values()):
        return None
    case, ways, q_in, q_out = run.plan(x.dtype, layer)
    if ways.few is not Route.FUSED or ways.of(x.numel() // layer.n) not in (Route.FUSED, Route.BUNDLED):
        return None
    vectors, transforms = (layer.su, layer.sv, layer.bias), (q_in[0], q_out[0])
    present = {name: v for name, v in watched.items() if v is not None}
    return Prepared(
        present=tuple((name, weakref.ref(v), v.data_ptr(), v.dtype) for name, v in present.items()),
        absent=tuple(name for name in watched if name not in present),
        settings=backend.settings(),
        dtype=x.dtype,
        m=layer.m,
        n=layer.n,
        routes=ways,
        call=codes_of(layer, case.planes).call(layer.n, x.dtype, vectors, transforms),
        bundles=(q_in[0], is_int8(case)),
    )
