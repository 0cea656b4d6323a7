"""The ops on GPUs, computed by the Triton kernels of `quip_kernels.gpu` as `route` says.

Codes come in either form (see `packing`); every call converts stored ones into the form of the kernels again.

With the backend "auto" they run on a device that has proved, family by family, that it computes right with them
(`self_check`); what it did not prove is left to the reference.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ... import codebooks
from ... import incoherence as transforms
from ...codebooks import implementation
from .. import reference
from ..backend import TRITON_DEVICES, for_device, get_activations, is_forced, prove_with
from ..bundle import joined, layers_of, rotation
from ..layer import Layer, named, stages
from ..packing import is_packed, pack
from . import self_check
from .route import ALL, DTYPES, Family, Route, digits, route

if TYPE_CHECKING:
    from quip_kernels.gpu.transform import Plan


def transform(x: torch.Tensor, incoherence: str, seed: int, transpose: bool) -> torch.Tensor:
    """See [`reference.transform`]; computed in float32."""
    has_kernel = x.dtype in DTYPES and x.numel() > 0
    plan = plan_on(x.device, incoherence, x.shape[-1], seed) if has_kernel else None
    if plan is None:
        return reference.transform(x, incoherence, seed, transpose)
    from quip_kernels.gpu.transform import transform as launch

    return launch(x.reshape(-1, x.shape[-1]).contiguous(), plan, transpose, x.dtype).view(x.shape)


def decode(weight: Sequence[torch.Tensor], codebook: str, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """See [`reference.decode`]; takes either form of the codes, and needs no kernel for stored E8P ones."""
    book, packed = codebooks.get(codebook), is_packed(weight, codebook)
    family = Family.DEQUANTIZE if packed else Family.TRELLIS
    has_kernel = dtype in DTYPES and (packed or book.kernels == "trellis")
    if not has_kernel or family not in trusted(weight[0].device):
        return reference.decode(weight, codebook, rows, columns, dtype)
    if not packed:
        from quip_kernels.gpu.trellis import dequantize as dequantize_trellis

        tensors = named(weight, book, rows, columns)
        codes = tensors["codes"].contiguous()
        return dequantize_trellis(codes, columns, dtype, *_trellis_code(codebook), tensors.get("table"))
    from quip_kernels.gpu.dequantize import dequantize

    codes, second = stages(weight)
    return dequantize(codes, columns, dtype, second, book.residual_scale or 0.0)


def linear(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    """See [`reference.linear`]; takes either form of the codes.

    If x is float16 or bfloat16, activations between transform and codes are rounded to 16 bits (fixed point in DIGITS,
    float16 with a scale for each vector above). If x is float32, they are rounded to 24 and 22 bits, and a product of more
    vectors than HALVES takes is computed in float32 as PyTorch's settings allow.
    """
    layer = Layer(*arguments)
    way = _way(x, layer)
    if way is Route.REFERENCE:
        return reference.linear(x, *layer)
    return _output(rotate(x, layer, way), layer, way, x)


def bundle(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    """See [`bundle.bundle`]; each linear as [`linear`] computes it, in either form of the codes."""

    def key(layer: Layer) -> tuple:
        return _way(x, layer), layer.book.kernels, rotation(layer)

    def rotated(layer: Layer) -> list[torch.Tensor] | None:
        way = _way(x, layer)
        return None if way is Route.REFERENCE else rotate(x, layer, way)

    def product(t: list[torch.Tensor] | None, layer: Layer) -> torch.Tensor:
        return reference.linear(x, *layer) if t is None else _output(t, layer, _way(x, layer), x)

    return joined(x, layers_of(*arguments), key, rotated, product)


def _way(x: torch.Tensor, layer: Layer) -> Route:
    return route(layer.book.kernels, x.dtype, x.numel() // layer.n, trusted(x.device))


def _output(rotated: list[torch.Tensor], layer: Layer, way: Route, x: torch.Tensor) -> torch.Tensor:
    """The output for x, of which [`rotate`] has made these."""
    packed = is_packed(layer.weight, layer.codebook)
    tensors = {} if packed else named(layer.weight, layer.book, layer.m, layer.n)
    if layer.book.kernels == "trellis":
        y, row_scale = _trellis_product(rotated, layer, tensors["codes"].contiguous(), tensors.get("table"), way)
    else:
        y, row_scale = _product(rotated, layer, stages(layer.weight if packed else pack(layer.weight)), way)
    return _transform_out(y, row_scale, layer, x)


def rotate(x: torch.Tensor, layer: Layer, way: Route) -> list[torch.Tensor]:
    """Q_inᵀ( su ⊙ x ) as the product of this route takes it.

    DIGITS: three tensors (`quip_kernels.gpu.quantize.Digits`). HALVES and DENSE_HALF: two (`small_batch.Halves`). The
    others: one of float32 [M, n].
    """
    from quip_kernels.gpu import quantize, small_batch
    from quip_kernels.gpu import transform as kernels

    columns = layer.n
    plan = plan_on(x.device, layer.incoherence_in, columns, layer.seed)
    rows = x.reshape(-1, columns).contiguous()
    count = digits(x.dtype, get_activations())
    if plan is not None and way is Route.DIGITS:
        return list(kernels.transform_quantize(rows, plan, layer.su, count))
    if plan is None:
        inner = reference.transform(rows.float() * layer.su.float(), layer.incoherence_in, layer.seed, True)
    else:
        inner = kernels.transform(rows, plan, True, torch.float32, pre=layer.su)
    if way is Route.DIGITS:
        return list(quantize.quantize(inner, count))
    if way is Route.HALVES:
        return list(small_batch.halves(inner, 2 if x.dtype == torch.float32 else 1))
    if way is Route.DENSE_HALF:
        # |w| < 4 in all stages together (trellis tables are meant for a unit Gaussian) and float16 ends at 65504:
        # no sum of `columns` products may exceed it
        most = 8192 if layer.book.kernels == "trellis" else 16384
        return list(small_batch.halves(inner, 1, limit=min(1.0, most / columns), width=columns))
    return [inner]


def _product(
    rotated: list[torch.Tensor], layer: Layer, codes: tuple[torch.Tensor, torch.Tensor | None], way: Route
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Ŵ times the rotated inputs: [M, m] or parts [P, M, m] of it, and a factor for each row or None.

    codes: of each stage, packed.
    """
    from quip_kernels.gpu import dequantize, matvec, quantize, small_batch

    (first, second), scale = codes, layer.book.residual_scale or 0.0
    if way is Route.DIGITS:
        return matvec.matvec(quantize.Digits(*rotated), first, layer.n, second, scale), None
    if way is Route.HALVES:
        return small_batch.small_batch(small_batch.Halves(*rotated), first, layer.n, second, scale), None
    if way is Route.DENSE_HALF:
        weight = dequantize.dequantize(first, layer.n, torch.float16, second, scale)
        return rotated[0][0] @ weight.T, rotated[1]
    return rotated[0] @ dequantize.dequantize(first, layer.n, torch.float32, second, scale).T, None


def _trellis_product(
    rotated: list[torch.Tensor], layer: Layer, codes: torch.Tensor, table: torch.Tensor | None, way: Route
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As [`_product`], for trellis codes."""
    from quip_kernels.gpu import trellis

    code = _trellis_code(layer.codebook)
    if way is Route.TRELLIS:
        return trellis.matvec(rotated[0], codes, *code, table), None
    if way is Route.DENSE_HALF:
        return rotated[0][0] @ trellis.dequantize(codes, layer.n, torch.float16, *code, table).T, rotated[1]
    return rotated[0] @ trellis.dequantize(codes, layer.n, torch.float32, *code, table).T, None


def _transform_out(y: torch.Tensor, row_scale: torch.Tensor | None, layer: Layer, x: torch.Tensor) -> torch.Tensor:
    """sv ⊙ Q_out(y) + bias in the shape and dtype of the output for x."""
    from quip_kernels.gpu.transform import transform as launch

    sv, bias = layer.sv, layer.bias
    plan = plan_on(x.device, layer.incoherence_out, layer.m, layer.seed)
    if plan is not None:
        y = launch(y, plan, False, x.dtype, row_scale=row_scale, post=sv, bias=bias)
    else:
        y = y.float().sum(0) if y.ndim == 3 else y.float()
        y = y if row_scale is None else y * row_scale[:, None]
        y = reference.transform(y, layer.incoherence_out, layer.seed, False) * sv.float()
        y = (y if bias is None else y + bias.float()).to(x.dtype)
    return y.view(*x.shape[:-1], layer.m)


def _trellis_code(codebook: str) -> tuple[str, float, str]:
    """Code, bits and order of a trellis codebook."""
    book: Any = codebooks.get(codebook)
    return book.code, book.k, book.order


def trusted(device: torch.device) -> Collection[Family]:
    """The families that compute on a device now: all where the user has chosen Triton, else those that it has proved."""
    if is_forced(device):
        return ALL
    return self_check.trusted(device) if for_device(device) == "triton" else ()


def encoder(device: torch.device) -> str:
    """As [`for_device`], for encoding weights."""
    chosen = for_device(device)
    return chosen if chosen != "triton" or is_forced(device) or self_check.encodes(device) else "reference"


def plan_on(device: torch.device, name: str, size: int, seed: int) -> Plan | None:
    """The transform for the kernels; None if they cannot compute it here."""
    return _plan(name, size, seed, device) if Family.TRANSFORM in trusted(device) else None


@functools.lru_cache(maxsize=256)
def _plan(name: str, size: int, seed: int, device: torch.device) -> Plan | None:
    """The transform for the kernels; None for a transform that is not a product of matrices."""
    from quip_kernels.gpu.transform import make_plan

    factors = transforms.get(name, size, seed).dense_factors
    return None if factors is None else make_plan(size, factors, device)


def register() -> None:
    """Make these the implementation on CUDA, ROCm and XPU devices, if the package `triton` is installed."""
    if importlib.util.find_spec("triton") is None:
        return
    prove_with(self_check.trusted)
    implementation.encode_with(encoder)
    for function in (transform, decode, linear, bundle):
        for device in TRITON_DEVICES:
            torch.library.impl(f"quip::{function.__name__}", device, function)
