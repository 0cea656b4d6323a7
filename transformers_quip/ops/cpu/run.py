"""The ops on the CPU, computed as `route` says."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from quip_kernels import cpu as cpu_kernels
from quip_kernels import cpu_linear as kernels
from quip_kernels import cpu_many, cpu_trellis

from ... import codebooks
from ... import incoherence as transforms
from ...codebooks.trellis import TILE
from .. import reference
from ..backend import for_device, get_activations
from ..grouped import linear_by_expert
from ..layer import Layer, named, stages
from ..packing import is_expanded, stored, trellis_layout
from ..same_input import SameInput
from . import scratch
from .codes import E8PCodes, TrellisCodes, codes_of, dtypes_are_known, types_fit
from .route import Case, Route, Routes, is_int8, planes, routes

logger = logging.getLogger(__name__)

# Weights that DECODED decodes at a time: the dense weight never exists as a whole in addition to its codes.
DECODED_WEIGHTS = 1 << 22

Side = tuple[kernels.Transform | None, transforms.Transform | None]
_threads = threading.local()


def transform(x: torch.Tensor, incoherence: str, seed: int, transpose: bool) -> torch.Tensor:
    """See [`reference.transform`]; computed in float32."""
    if x.numel() == 0 or x.dtype not in kernels.DTYPES or not _is_usable():
        return reference.transform(x, incoherence, seed, transpose)
    q, _ = side(incoherence, x.shape[-1], seed)
    return reference.transform(x, incoherence, seed, transpose) if q is None else kernels.transform(x, q, transpose)


def decode(weight: Sequence[torch.Tensor], codebook: str, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """See [`reference.decode`]."""
    book = codebooks.get(codebook)
    if book.kernels is None or dtype not in kernels.DTYPES or not _is_usable() or not dtypes_are_known(weight):
        return reference.decode(weight, codebook, rows, columns, dtype)
    if is_expanded(weight) and book.kernels == "e8p":
        codes, second = stages(weight)
        return kernels.decode(codes, columns, dtype, None, None, second, book.residual_scale or 1.0)
    tensors = named(stored(weight, codebook, columns), book, rows, columns)
    if book.kernels == "trellis":
        return cpu_trellis.decode(tensors["codes"], columns, dtype, trellis_layout(codebook), tensors.get("table"))
    codes, second = stages(list(tensors.values()))
    return kernels.decode(codes, columns, dtype, None, None, second, book.residual_scale or 1.0)


def linear(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    """See [`reference.linear`]."""
    layer = with_stored_codes(Layer(*arguments))
    decisions = plan(x.dtype, layer)
    return computed(x, layer, decisions, decisions.routes.of(x.numel() // decisions.case.n))


def with_stored_codes(layer: Layer) -> Layer:
    """The layer with its codes in the stored form."""
    if layer.weight[0].dtype is torch.int32:  # may be packed: stored codes of kernels are never int32
        return layer._replace(weight=stored(layer.weight, layer.codebook, layer.n))
    return layer


def computed(x: torch.Tensor, layer: Layer, plan: Plan, way: Route) -> torch.Tensor:
    """The layer's output by one of the routes of its plan."""
    case, _, q_in, q_out = plan
    if way is Route.REFERENCE:
        return reference.linear(x, *layer)
    codes = codes_of(layer, case.planes)
    if way is Route.FUSED:
        return codes.multiply(x, (layer.su, layer.sv, layer.bias), (q_in[0], q_out[0]))
    if way is Route.PRODUCTS:
        t = _transform_in(x, layer.su, q_in, torch.empty(x.shape))
        z = codes.multiply(t, (None, None, None), (None, None))
        return _transform_out(z, layer, q_out, x.dtype)
    if way is Route.BUNDLED:
        if not isinstance(codes, E8PCodes):
            raise TypeError(f"only E8P codes are computed in bundles, got codebook {layer.codebook}")
        keep, address = codes.describe(layer.n, (layer.su, layer.sv, layer.bias), (q_in[0], q_out[0]))
        y = bundled(x, kernels.rows_of(x, layer.n), layer.su, layer.sv, address, layer.m, q_in[0], is_int8(case))
        del keep  # kept alive until here
        return y
    return _decoded(x, layer, codes, q_in, q_out)


class Plan(NamedTuple):
    """The decisions of `route`, and the transforms of inputs and outputs: the values of tensors do not matter."""

    case: Case
    routes: Routes
    q_in: Side
    q_out: Side


def plan(dtype: torch.dtype, layer: Layer) -> Plan:
    """The plan for a layer in the stored form and activations of this dtype."""
    weight, su, sv, bias, *names = layer
    types = (su.dtype, sv.dtype, None if bias is None else bias.dtype, *[v.dtype for v in weight])
    usable = _is_usable()
    expanded = is_expanded(weight)
    has_amx = usable and cpu_many.is_available() and not expanded
    return _plan(dtype, sv.shape[0], su.shape[0], types, get_activations(), usable, has_amx, expanded, *names)


@functools.lru_cache(maxsize=1024)
def _plan(
    dtype: torch.dtype,
    m: int,
    n: int,
    types: tuple[torch.dtype | None, ...],
    activations: str,
    usable: bool,
    has_amx: bool,
    expanded: bool,
    codebook: str,
    incoherence_in: str,
    incoherence_out: str,
    seed: int,
) -> Plan:
    book, q_in, q_out = codebooks.get(codebook), side(incoherence_in, n, seed), side(incoherence_out, m, seed)
    if usable and book.kernels is None:
        _tell(f"the CPU library has no kernels for codebook {book.name!r}")
    case = Case(
        book.kernels,
        len(types) - 3,
        dtype,
        m,
        n,
        planes(dtype, activations),
        tensors_fit=types_fit(codebook, types[3:], types[:3]),
        has_transforms=q_in[1] is None and q_out[1] is None,
        is_usable=usable,
        has_amx=has_amx,
        is_expanded=expanded,
    )
    return Plan(case, routes(case), q_in, q_out)


def _is_usable() -> bool:
    """Whether the library is available and the user allows it."""
    if for_device("cpu") != "cpu":
        return False
    if not cpu_kernels.is_available():
        _tell("the compiled CPU library is missing (it is built if a C compiler is found at install time)")
        return False
    return True


@functools.cache
def _tell(reason: str) -> None:
    logger.info("%s: quantized layers run through PyTorch, which is slower", reason)


@functools.lru_cache(maxsize=512)
def side(incoherence: str, size: int, seed: int) -> Side:
    """The transform in the library's form, or for PyTorch; both None for the identity."""
    q = transforms.get(incoherence, size, seed)
    if q.is_identity:
        return None, None
    if q.dense_factors is None:
        return None, q
    return kernels.Transform(q.dense_factors), None


def rotated_inputs() -> SameInput[torch.Tensor]:
    """The last rotated input of this thread, Q_inᵀ( su ⊙ x ), for linears that read the same x with equal su (q, k, v).

    For few vectors, where the rotation is a part of the library's call, sharing would save less than it costs.
    """
    shared: SameInput[torch.Tensor] | None = getattr(_threads, "rotated", None)
    if shared is None:
        shared = _threads.rotated = SameInput(scratch.scratch)
    return shared


def _decoded(x: torch.Tensor, layer: Layer, codes: E8PCodes | TrellisCodes, q_in: Side, q_out: Side) -> torch.Tensor:
    """The layer through matrix products with decoded rows; linears that read the same x share its rotation."""
    su, shape = layer.su, (x.numel() // layer.n, layer.n)
    shared, key = rotated_inputs(), (q_in, shape, _decoded_dtype(x))
    t = shared.take(su, (x, su), key)
    if t is None:
        t = rotated(x, layer, q_in)
        shared.keep(su, (x, su), key, t)
    return decoded(t, layer, codes, q_out, x.dtype).reshape(*x.shape[:-1], layer.m)


def _decoded_dtype(x: torch.Tensor) -> torch.dtype:
    """Of products with decoded rows: bfloat16 for bfloat16 x, as of a dense layer, else float32."""
    return torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32


def rotated(x: torch.Tensor, layer: Layer, q_in: Side) -> torch.Tensor:
    """Q_inᵀ( su ⊙ x ) as [`decoded`] takes it, [vectors, n] in scratch memory."""
    rotated_inputs().forget()  # those of another input are in the same memory
    vectors = x.reshape(-1, layer.n)
    return _transform_in(vectors, layer.su, q_in, scratch.scratch("rotated inputs", vectors.shape, _decoded_dtype(x)))


def decoded(t: torch.Tensor, layer: Layer, codes: E8PCodes | TrellisCodes, q_out: Side, dtype: torch.dtype) -> torch.Tensor:
    """sv ⊙ Q_out( Ŵ t ) + bias for rotated inputs t [vectors, n]: [vectors, m] in this dtype."""
    n, m = layer.n, layer.m
    z = scratch.scratch("rotated outputs", (len(t), m), t.dtype)
    rows = min(m, max(1, DECODED_WEIGHTS // n // TILE) * TILE)
    for begin in range(0, m, rows):
        count = min(rows, m - begin)
        weight = codes.decode(slice(begin, begin + count), scratch.scratch("decoded rows", (count, n), t.dtype))
        if rows >= m:
            torch.mm(t, weight.T, out=z)
        else:
            block = scratch.scratch("block of outputs", (len(t), count), t.dtype)
            z[:, begin : begin + count] = torch.mm(t, weight.T, out=block)
    return _transform_out(z, layer, q_out, dtype)


def bundled(
    x: torch.Tensor,
    rows: torch.Tensor,
    su: torch.Tensor,
    sv: torch.Tensor,
    address: int,
    m: int,
    q_in: kernels.Transform | None,
    int8: bool,
) -> torch.Tensor:
    """Many vectors in one call, which computes the rotated inputs unless this thread has them already.

    Args:
        x: [..., n]. rows: the same, [vectors, n] or contiguous, with neighbours in memory along the last dimension.
        sv: says which linear this is: linears of one input may have one su.
        address: of the layer's description. q_in: the transform of its inputs.
        int8: whether they are multiplied in 8 bits.
    """
    n, threads = x.shape[-1], torch.get_num_threads()
    vectors = x.numel() // n
    plan = cpu_many.plan(vectors, m, n, int8, threads)
    memory = scratch.scratch("workspace", (plan.workspace,), torch.float32)
    shared, key = rotated_inputs(), (q_in, plan.rotated_shape, torch.int32)
    t = shared.take(sv, (x, su), key)
    is_rotated = t is not None
    if t is None:
        t = scratch.scratch("rotated inputs", plan.rotated_shape, torch.int32)
    y = x.new_empty((*x.shape[:-1], m))
    stride = n if rows is x else rows.stride(0)
    cpu_many.run(address, rows, y, vectors, stride, t, is_rotated, int8, memory, plan, threads)
    if not is_rotated:
        shared.keep(sv, (x, su), key, t)
    return y


def _transform_in(x: torch.Tensor, su: torch.Tensor, q: Side, out: torch.Tensor) -> torch.Tensor:
    """Q_inᵀ( su ⊙ x ), written to `out`."""
    fast, slow = q
    if fast is not None:
        return kernels.transform(x, fast, True, before=su, out=out)
    t = x.float() * su.float()
    return out.copy_(t if slow is None else slow.apply_transpose(t))


def _transform_out(z: torch.Tensor, layer: Layer, q: Side, dtype: torch.dtype) -> torch.Tensor:
    """sv ⊙ Q_out(z) + bias in this dtype."""
    fast, slow = q
    if fast is not None:
        return kernels.transform(z, fast, after=layer.sv, bias=layer.bias, dtype=dtype)
    y = (z.float() if slow is None else slow.apply(z.float())) * layer.sv.float()
    return (y if layer.bias is None else y + layer.bias.float()).to(dtype)


def grouped_linear(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    """See [`grouped.grouped_linear`]."""
    return linear_by_expert(linear, x, *arguments)


def register() -> None:
    """Make these the implementation for tensors on the CPU."""
    for function in (transform, decode, linear, grouped_linear):
        torch.library.impl(f"quip::{function.__name__}", "cpu", function)
