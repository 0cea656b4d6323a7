"""The shortest way to the CPU library, for calls that nothing but the computation is interested in.

PyTorch's dispatcher takes longer to call an op written in Python than the library takes to compute a small layer, and a
model makes some two hundred such calls for each token. What has to be looked up and checked takes as long, because the
weights have driven everything else out of the caches: it is done once for each layer, and then only seen to be still so.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence

import torch

from ..backend import get_activations, get_backend
from ..layer import Layer
from . import run as cpu


def linear(x: torch.Tensor, layer: Layer) -> torch.Tensor:
    """The result of torch.ops.quip.linear, without a graph for derivatives."""
    if type(x) is torch.Tensor and x.is_cpu and layer.weight[0].is_cpu and not _is_watched():
        return cpu.eager_linear(x, *layer)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.quip.linear(x, *layer)


class Prepared:
    """A layer, for vectors of one dtype, few or as many as are one call too: all that stays the same from call to call.

    It holds no tensor. It is for the tensors that it was made with, as long as they lie where they lay; what is written to
    them changes the layer as it should.
    """

    __slots__ = ("_absent", "_arguments", "_bundles", "_call", "_dtype", "_keep")
    __slots__ += ("_m", "_most", "_n", "_present", "_settings")

    def __init__(
        self,
        x: torch.Tensor,
        tensors: Mapping[str, torch.Tensor | None],
        call: cpu.OneCall,
    ):
        present = {name: v for name, v in tensors.items() if v is not None}
        self._present = tuple((name, weakref.ref(v), v.data_ptr(), v.dtype) for name, v in present.items())
        self._absent = tuple(name for name in tensors if name not in present)
        self._call, self._arguments, self._keep = call.function, (call.address, call.arguments), call.keep
        self._bundles = call.bundles
        self._dtype, self._m, self._n, self._most = x.dtype, call.m, call.n, call.most
        self._settings = (get_backend(), get_activations())

    def __call__(self, x: torch.Tensor, tensors: Mapping[str, torch.Tensor | None]) -> torch.Tensor | None:
        """The layer's output, or None where it has to be looked up again.

        Args:
            x: [..., n]. tensors: by name, the layer's, and maybe others.
        """
        n, m, shape = self._n, self._m, x.shape
        count = x.numel() // n
        if (
            type(x) is not torch.Tensor
            or x.dtype is not self._dtype
            or count == 0
            or (count > self._most and self._bundles is None)
            or shape[-1] != n
            or not x.is_cpu
            or not x.is_contiguous()
            or (get_backend(), get_activations()) != self._settings
            or torch.is_grad_enabled()
            or _is_watched()
        ):
            return None
        for name, known, address, dtype in self._present:
            v = tensors[name]
            if v is None or v is not known() or v.data_ptr() != address or v.dtype is not dtype:
                return None
        for name in self._absent:
            if tensors[name] is not None:
                return None
        address, rest = self._arguments
        if count > self._most:
            return cpu.eager_bundled(x, tensors["su"], address, m, *self._bundles)
        y = x.new_empty((*shape[:-1], m))
        if self._call(address, x.data_ptr(), y.data_ptr(), count, *rest, torch.get_num_threads()):
            raise MemoryError(f"no memory for {count} vectors of {n} inputs and {m} outputs")
        return y


def prepare(
    x: torch.Tensor, tensors: Mapping[str, torch.Tensor | None], names: Sequence[str], layer: Layer
) -> Prepared | None:
    """An object that computes such inputs as x from now on; None where one call of the library does not.

    Args:
        x: [..., n].
        tensors: by name, all of the layer's.
        names: of its stored tensors, in their order.
        layer: the same tensors.
    """
    if type(x) is not torch.Tensor or not x.is_cpu:
        return None
    watched = {name: tensors[name] for name in (*names, "su", "sv", "bias")}
    if not all(v is None or (v.is_cpu and v.is_contiguous()) for v in watched.values()):
        return None
    found = cpu.one_call(x, layer)
    return None if found is None else Prepared(x, watched, found)


def _is_watched() -> bool:
    """Whether a dispatch mode, a function transform (vmap, grad) or the profiler has to see each op."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd._profiler_enabled()
    )
