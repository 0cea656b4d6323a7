"""Transformers' tensor parallelism for quantized linears: two styles in the place of "colwise" and "rowwise".

Transformers' own styles cut every tensor of a linear by its rows or columns, so they would cut su. These keep what
`nn.shares` says, and compute a linear from the shares. Linears that were left dense, which a rule may also match, keep
Transformers' style.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer

from ..nn.fused import FusedRows
from ..nn.linear import QuipLinear
from ..nn.shares import Scheme, Share, of_inputs, of_outputs, of_rows, outputs_of, scales_of
from ..ops import packing
from ..ops.bundle import Form, described


class Division(NamedTuple):
    """One of Transformers' styles for linears.

    Attributes:
        divides_inputs: whether the inputs are divided among the processes, rather than the outputs.
        splits: whether every process gets all of the inputs that are to be divided.
        gathers: whether every process gets all outputs of a linear that is divided by them.
    """

    divides_inputs: bool = False
    splits: bool = False
    gathers: bool = False


DIVISIONS = {
    "colwise": Division(),
    "colwise_rep": Division(gathers=True),
    "colwise_gather_output": Division(gathers=True),
    "rowwise": Division(divides_inputs=True),
    "rowwise_split_input": Division(divides_inputs=True, splits=True),
    "rowwise_rep": Division(divides_inputs=True, splits=True),
}


def name_of(style: str) -> str:
    """The name of the style for quantized linears in the place of one of `DIVISIONS`."""
    return f"quip_{style}"


class QuipParallel(TensorParallelLayer):
    """The style in the place of one of Transformers'.

    Args:
        style: a key of `DIVISIONS`.
    """

    def __init__(self, style: str):
        self.style, self.division = style, DIVISIONS[style]

    def _plain(self) -> Any:
        return ALL_PARALLEL_STYLES[self.style]

    def shard_param(self, module: Any, param: str, mesh: Any) -> None:
        """Make a parameter a DTensor of which this process reads its part."""
        if not isinstance(module, (QuipLinear, FusedRows)):
            self._plain().shard_param(module, param, mesh)
            return
        share, given = share_of(module, self.division, mesh), module._parameters.get(param)
        if share is None or given is None or share.scheme is Scheme.WHOLE:
            return
        value = distribute_tensor(given, mesh, [_placement(share, param, given)], src_data_rank=None)
        module._parameters[param] = nn.Parameter(value, requires_grad=False)

    def install_forward(self, module: Any, mesh: Any) -> Any:
        """Replace the forward of a module by one that computes with this process's parts."""
        if not isinstance(module, (QuipLinear, FusedRows)):
            return self._plain().install_forward(module, mesh)
        share = share_of(module, self.division, mesh)
        forward: Any = functools.partial(_whole, module.forward, self.division, mesh)
        if isinstance(module, QuipLinear) and share is not None and share.scheme is not Scheme.WHOLE:
            forward = Divided(module, share, self.division, mesh)
        module.__dict__["forward"] = forward
        return module


def register() -> None:
    """Make the styles known to Transformers."""
    for style in DIVISIONS:
        if style in ALL_PARALLEL_STYLES.valid_keys():
            ALL_PARALLEL_STYLES.register(name_of(style), QuipParallel(style))


def share_of(module: QuipLinear | FusedRows, division: Division, mesh: Any) -> Share | None:
    """This process's share; None for a module with parts that only it computes by itself."""
    if type(module) is not QuipLinear:
        return None
    form = Form(module.codebook, module.incoherence_in, module.incoherence_out, module.seed)
    m, n, rank, size = module.out_features, module.in_features, mesh.get_local_rank(), mesh.size()
    if not division.divides_inputs:
        own = [(rank * m // size, (rank + 1) * m // size)]
        return of_outputs(form, m, n, rank, size, own) if m % size == 0 else None
    share = of_inputs(form, m, n, rank, size)
    return share if share.scheme is not Scheme.BLOCKS or _is_a_slice(share, module) else of_rows(form, m, n, rank, size)


def _is_a_slice(share: Share, module: QuipLinear) -> bool:
    """Whether the columns of the share are neighbours in each row of the stored tensors, as DTensor cuts them."""
    for name in module.tensor_names:
        tensor = torch.empty(module.get_parameter(name).shape, dtype=torch.uint8, device="meta")
        part = share.cut(name, tensor)
        width = tensor.shape[1] * (share.columns[1] - share.columns[0]) // share.n
        begin = tensor.shape[1] * share.columns[0] // share.n
        wanted = tensor[:, begin : begin + width]
        if part.shape != wanted.shape or part.stride() != wanted.stride() or part.storage_offset() != begin:
            return False
    return True


def _placement(share: Share, name: str, tensor: torch.Tensor) -> Any:
    """How DTensor cuts a tensor of a linear: by the dimension in which the share is smaller."""
    if name in ("su", "sv"):
        begin, end = share.su if name == "su" else share.sv
        return Shard(0) if end - begin < len(tensor) else Replicate()
    if name not in share.grids:  # the bias
        return Replicate()
    shape = share.grids[name].shape
    return next(
        (Shard(i) for i, (own, whole) in enumerate(zip(shape, tensor.shape, strict=True)) if own != whole), Replicate()
    )


def _gathered(x: torch.Tensor, mesh: Any) -> torch.Tensor:
    """The parts of all processes along the last dimension. Raises `RuntimeError` if their gradients are needed."""
    if torch.is_grad_enabled() and x.requires_grad:
        raise RuntimeError(
            "Quantized linears that are divided among processes (tp_plan) have no gradients: call the model in "
            "torch.no_grad(), or train with one copy of the model for each device"
        )
    parts = [torch.empty_like(x) for _ in range(mesh.size())]
    torch.distributed.all_gather(parts, x.contiguous(), group=mesh.get_group())
    return torch.cat(parts, dim=-1)


def _own(x: torch.Tensor, mesh: Any) -> torch.Tensor:
    """This process's part of the last dimension."""
    return x.chunk(mesh.size(), dim=-1)[mesh.get_local_rank()]


def _whole(forward: Any, division: Division, mesh: Any, x: torch.Tensor) -> torch.Tensor:
    """A module that every process computes whole."""
    if division.divides_inputs:
        return forward(x if division.splits else _gathered(x, mesh))
    y = forward(x)
    return y if division.gathers else _own(y, mesh)


class Divided:
    """The forward of a quantized linear of which this process holds a share.

    Args:
        module: whose parameters are DTensors. share: this process's. division: of the style. mesh: of the processes.
    """

    def __init__(self, module: QuipLinear, share: Share, division: Division, mesh: Any):
        self.module, self.share, self.division, self.mesh = module, share, division, mesh
        self.linear = described([share.form])
        self._made_from: list[torch.Tensor] = []
        self._weight: list[torch.Tensor] = []
        self._sv: torch.Tensor | None = None
        self._rest: torch.Tensor | None = None

    def _local(self, name: str) -> torch.Tensor:
        value = self.module._parameters[name]
        assert value is not None
        return value.to_local() if isinstance(value, DTensor) else value

    def _prepare(self) -> None:
        """Bring the tensors into the form that the op takes, as long as they are the same ones."""
        names = (*self.module.tensor_names, "sv")
        current = [self.module._parameters[name] for name in names]
        if len(current) == len(self._made_from) and all(a is b for a, b in zip(current, self._made_from, strict=True)):
            return
        weight = [self._local(name).contiguous() for name in self.module.tensor_names]
        self._weight = list(packing.converted(weight, self.module.codebook, self.module.weight_dtype))
        self._sv = sv = self._local("sv")
        if self.share.scheme is Scheme.ROWS:
            self._sv, self._rest = scales_of(self.share, sv)
        self._made_from = current  # type: ignore[assignment] # none of them is None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The module's outputs for its inputs, as the style divides them."""
        self._prepare()
        share, division, mesh = self.share, self.division, self.mesh
        assert self._sv is not None
        blocks = share.scheme is Scheme.BLOCKS
        if division.divides_inputs:
            x = (_own(x, mesh) if division.splits else x) if blocks else (x if division.splits else _gathered(x, mesh))
        y = torch.ops.quip.bundle(x, self._weight, [self._local("su")], [self._sv], self.linear)
        if not blocks:
            assert self._rest is not None
            y = outputs_of(_gathered(y, mesh), share, self._rest)
        elif division.divides_inputs:
            torch.distributed.all_reduce(y, group=mesh.get_group())
        bias = None if self.module.bias is None else self._local("bias")
        if blocks and not division.divides_inputs:
            y = y if bias is None else y + _own(bias, mesh)
            return _gathered(y, mesh) if division.gathers else y
        y = y if bias is None else y + bias
        return y if division.divides_inputs or division.gathers else _own(y, mesh)
