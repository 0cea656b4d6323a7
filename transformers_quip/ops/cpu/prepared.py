"""The shortest way to the CPU library, for calls that nothing but the computation is interested in.

PyTorch's dispatcher takes longer to call an op written in Python than the library takes to compute a small layer, and a
model makes some two hundred such calls for each token. What has to be looked up and checked takes as long, because the
weights have driven everything else out of the caches: it is done once for each layer, and then only seen to be still so.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping

import torch

from ..backend import get_activations, get_backend
from . import run as cpu
from . import torch_private


def linear(x: torch.Tensor, codes: torch.Tensor, *arguments) -> torch.Tensor:
    """What torch.ops.quip.linear returns, without a graph for derivatives."""
    if torch_private.is_recorded():
        return torch.ops.quip.linear(x, codes, *arguments)
    if type(x) is torch.Tensor and x.is_cpu and codes.is_cpu and not torch_private.is_watched():
        return cpu.linear(x, codes, *arguments)
    with torch_private.below_autograd():
        return torch.ops.quip.linear(x, codes, *arguments)


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
            x: [..., n]. tensors: by name, those of `TENSORS`, the table, and maybe others.
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
            or torch_private.is_watched()
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
            return cpu.bundled(x, x, tensors["su"], address, m, *self._bundles)
        y = x.new_empty((*shape[:-1], m))
        if self._call(address, x.data_ptr(), y.data_ptr(), count, *rest, torch.get_num_threads()):
            raise MemoryError(f"no memory for {count} vectors of {n} inputs and {m} outputs")
        return y


TENSORS = ("codes", "codes_residual", "su", "sv", "bias")


def prepare(
    x: torch.Tensor,
    tensors: Mapping[str, torch.Tensor | None],
    codebook: str,
    incoherence_in: str,
    incoherence_out: str,
    seed: int,
    residual_scale: float | None,
) -> Prepared | None:
    """What computes such inputs as x from now on; None where one call of the library does not.

    Args: see [`linear`]; tensors: by name, at least `TENSORS` and the table.
    """
    if type(x) is not torch.Tensor or not x.is_cpu:
        return None
    tensors = {name: tensors[name] for name in (*TENSORS, "table")}
    if not all(v is None or (v.is_cpu and v.is_contiguous()) for v in tensors.values()):
        return None
    *parts, table = tensors.values()
    found = cpu.one_call(x, *parts, codebook, incoherence_in, incoherence_out, seed, residual_scale, table)
    return None if found is None else Prepared(x, tensors, found)
