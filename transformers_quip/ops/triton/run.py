"""The ops on GPUs: which Triton kernel of `quip_kernels.gpu` computes what. Anything else goes to the reference.

Codes come in either form (see `packing`); every call brings stored ones into the form of the kernels again.

They run only where the user asks for them, `set_backend("triton")`: until they have been measured on a device, "auto" is
the reference there.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from quip_kernels import e8p

from ... import codebooks
from ... import incoherence as transforms
from .. import reference
from ..backend import get_activations, uses_triton
from ..layer import Layer, named, stages
from ..packing import DEVICES, is_packed, pack

if TYPE_CHECKING:
    from quip_kernels.gpu.transform import Plan

# Up to so many vectors the integer kernel decodes once for all; above, tensor cores; above that, a dense weight and a GEMM.
MATVEC_UP_TO = 4
SMALL_BATCH_UP_TO = 64
TRELLIS_MATVEC_UP_TO = 8
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def transform(x: torch.Tensor, incoherence: str, seed: int, transpose: bool) -> torch.Tensor:
    """See [`reference.transform`]; computed in float32."""
    has_kernel = uses_triton() and x.dtype in _DTYPES and x.numel() > 0
    plan = _plan(incoherence, x.shape[-1], seed, x.device) if has_kernel else None
    if plan is None:
        return reference.transform(x, incoherence, seed, transpose)
    from quip_kernels.gpu.transform import transform as launch

    return launch(x.reshape(-1, x.shape[-1]).contiguous(), plan, transpose, x.dtype).view(x.shape)


def decode(weight: Sequence[torch.Tensor], codebook: str, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """See [`reference.decode`]; takes either form of the codes, and needs no kernel for stored E8P ones."""
    book, packed = codebooks.get(codebook), is_packed(weight, codebook)
    if not uses_triton() or dtype not in _DTYPES or not (packed or book.kernels == "trellis"):
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

    Where x is float16 or bfloat16, activations between transform and codes are rounded to 16 bits (fixed point up to
    `MATVEC_UP_TO` vectors, float16 with a scale for each vector above); where it is float32, to 24 and 22 bits, and a
    product of more than `SMALL_BATCH_UP_TO` vectors is made in float32 as PyTorch's settings allow.
    """
    layer = Layer(*arguments)
    if not uses_triton() or not _has_kernels(x, layer.codebook):
        return reference.linear(x, *layer)
    rotated = rotate(x, layer.su, layer.codebook, layer.incoherence_in, layer.seed, get_activations())
    return rotated_linear(x, rotated, *layer)


def rotated_form(x: torch.Tensor, codebook: str, activations: str) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each tensor that [`rotate`] returns for this x; where there are no kernels, of the reference's.

    digits (`quip_kernels.gpu.quantize.Digits`) for the integer kernel, halves (`small_batch.Halves`) for tensor cores and
    for a GEMM in float16, one tensor of float32 [M, n] for everything else.
    """
    if activations == reference.REFERENCE or x.device.type not in DEVICES or not _has_kernels(x, codebook):
        return [(tuple(x.shape), reference.compute_dtype(x.dtype))]
    columns, rows, words = x.shape[-1], math.prod(x.shape[:-1]), e8p.words(x.shape[-1])
    wide, trellis = x.dtype == torch.float32, codebooks.get(codebook).kernels == "trellis"
    if not trellis and rows <= MATVEC_UP_TO:
        count = _digits(x.dtype, activations)
        return [((rows, count, 8, words), torch.int32), ((rows, count), torch.int32), ((rows,), torch.float32)]
    if not trellis and rows <= SMALL_BATCH_UP_TO:
        return [((2 if wide else 1, rows, e8p.WEIGHTS_PER_WORD * words), torch.float16), ((rows,), torch.float32)]
    if wide or (trellis and rows <= TRELLIS_MATVEC_UP_TO):
        return [((rows, columns), torch.float32)]
    return [((1, rows, columns), torch.float16), ((rows,), torch.float32)]


def rotate(
    x: torch.Tensor, su: torch.Tensor, codebook: str, incoherence: str, seed: int, activations: str
) -> list[torch.Tensor]:
    """See [`reference.rotate`]; returns what [`rotated_form`] says."""
    if activations == reference.REFERENCE or not _has_kernels(x, codebook):
        return reference.rotate(x, su, codebook, incoherence, seed, activations)
    from quip_kernels.gpu import quantize, small_batch
    from quip_kernels.gpu import transform as kernels

    columns = x.shape[-1]
    plan = _plan(incoherence, columns, seed, x.device)
    rows = x.reshape(-1, columns).contiguous()
    batch, wide, trellis = len(rows), x.dtype == torch.float32, codebooks.get(codebook).kernels == "trellis"
    if plan is not None and not trellis and batch <= MATVEC_UP_TO:
        return list(kernels.transform_quantize(rows, plan, su, _digits(x.dtype, activations)))
    if plan is None:
        inner = reference.transform(rows.float() * su.float(), incoherence, seed, True)
    else:
        inner = kernels.transform(rows, plan, True, torch.float32, pre=su)
    if not trellis and batch <= MATVEC_UP_TO:
        return list(quantize.quantize(inner, _digits(x.dtype, activations)))
    if not trellis and batch <= SMALL_BATCH_UP_TO:
        return list(small_batch.halves(inner, 2 if wide else 1))
    if wide or (trellis and batch <= TRELLIS_MATVEC_UP_TO):
        return [inner]
    # |w| < 4 in all stages together (those of trellis tables are meant for a unit Gaussian) and float16 ends at 65504: no
    # sum of `columns` products may exceed it
    return list(small_batch.halves(inner, 1, limit=min(1.0, (8192 if trellis else 16384) / columns), width=columns))


def rotated_linear(x: torch.Tensor, rotated: list[torch.Tensor], *arguments: Any) -> torch.Tensor:
    """See [`reference.rotated_linear`]; `rotated` is what [`rotate`] returned here."""
    layer = Layer(*arguments)
    # more than one tensor is a form of the kernels, whatever was chosen since
    if len(rotated) == 1 and not (uses_triton() and _has_kernels(x, layer.codebook)):
        return reference.rotated_linear(x, rotated, *layer)
    from quip_kernels.gpu.transform import transform as launch

    columns, weight, book, sv, bias = x.shape[-1], layer.weight, layer.book, layer.sv, layer.bias
    packed = is_packed(weight, layer.codebook)
    tensors = {} if packed else named(weight, book, layer.m, columns)
    if book.kernels == "trellis":
        codes, table = tensors["codes"].contiguous(), tensors.get("table")
        y, row_scale = _trellis_product(rotated, codes, columns, _trellis_code(layer.codebook), table)
    else:
        codes, second = stages(weight if packed else pack(weight))
        y, row_scale = _product(rotated, (codes, columns, second, book.residual_scale or 0.0))
    plan = _plan(layer.incoherence_out, layer.m, layer.seed, x.device)
    if plan is not None:
        y = launch(y, plan, False, x.dtype, row_scale=row_scale, post=sv, bias=bias)
    else:
        y = y.float().sum(0) if y.ndim == 3 else y.float()
        y = y if row_scale is None else y * row_scale[:, None]
        y = reference.transform(y, layer.incoherence_out, layer.seed, False) * sv.float()
        y = (y if bias is None else y + bias.float()).to(x.dtype)
    return y.view(*x.shape[:-1], layer.m)


def _digits(dtype: torch.dtype, activations: str) -> int:
    """Bytes of an activation in the integer kernel."""
    return 1 if activations == "int8" else 3 if dtype == torch.float32 else 2


def _product(rotated: list[torch.Tensor], stages: tuple) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Ŵ times what [`rotate`] returned: [M, m] or parts [P, M, m] of it, and a factor for each row or None.

    stages: planes, columns, planes of the second stage and what multiplies them, as the kernels take them.
    """
    from quip_kernels.gpu import dequantize, matvec, quantize, small_batch

    if len(rotated) == 3:
        return matvec.matvec(quantize.Digits(*rotated), *stages), None
    planes, columns, *second = stages
    if len(rotated) == 1:
        return rotated[0] @ dequantize.dequantize(planes, columns, torch.float32, *second).T, None
    values, scales = rotated
    if values.shape[1] <= SMALL_BATCH_UP_TO:
        return small_batch.small_batch(small_batch.Halves(values, scales), *stages), None
    return values[0] @ dequantize.dequantize(planes, columns, torch.float16, *second).T, scales


def _trellis_product(
    rotated: list[torch.Tensor],
    codes: torch.Tensor,
    columns: int,
    layout: tuple[str, int, str],
    table: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As [`_product`], for trellis codes."""
    from quip_kernels.gpu import trellis

    if len(rotated) == 2:
        return rotated[0][0] @ trellis.dequantize(codes, columns, torch.float16, *layout, table).T, rotated[1]
    (inner,) = rotated
    if len(inner) <= TRELLIS_MATVEC_UP_TO:
        return trellis.matvec(inner, codes, *layout, table), None
    return inner @ trellis.dequantize(codes, columns, torch.float32, *layout, table).T, None


def _trellis_code(codebook: str) -> tuple[str, int, str]:
    """Code, bits and order of a trellis codebook."""
    book: Any = codebooks.get(codebook)
    return book.code, book.k, book.order


def _has_kernels(x: torch.Tensor, codebook: str) -> bool:
    """Whether there are kernels for this input and codes of this codebook, whatever was chosen."""
    return codebooks.get(codebook).kernels is not None and x.dtype in _DTYPES and x.numel() > 0


@functools.lru_cache(maxsize=256)
def _plan(name: str, size: int, seed: int, device: torch.device) -> Plan | None:
    """The transform for the kernels; None for a transform that is no product of matrices."""
    from quip_kernels.gpu.transform import make_plan

    factors = transforms.get(name, size, seed).dense_factors
    return None if factors is None else make_plan(size, factors, device)


def register() -> None:
    """Make these the implementation on CUDA, ROCm and XPU devices, if the package `triton` is there."""
    if importlib.util.find_spec("triton") is None:
        return
    for function in (transform, decode, linear, rotate, rotated_linear):
        for device in DEVICES:
            torch.library.impl(f"quip::{function.__name__}", device, function)
