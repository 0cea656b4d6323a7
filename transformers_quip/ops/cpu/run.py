"""The ops on the CPU: which kernel of the compiled library computes them, and when the reference does."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from quip_kernels import cpu as cpu_kernels
from quip_kernels import cpu_linear as kernels
from quip_kernels import cpu_many as many_kernels
from quip_kernels import cpu_trellis as trellis_kernels
from quip_kernels.cpu_library import default_level, library

from ... import codebooks
from ... import incoherence as transforms
from ...codebooks.trellis import TILE
from .. import reference
from ..backend import get_activations, get_backend
from ..layer import Layer, integer_dtypes, named, stages
from ..packing import stored
from . import scratch

logger = logging.getLogger(__name__)

# Up to so many vectors, by the planes of activations, products with the codes are faster than decoding the weight and a
# matrix product with it (measured at 1536x576 and 2048x2048 with AVX-512; the bfloat16 product is the faster one).
MOST_VECTORS = {3: 64, 2: 40, 1: 64}
# The same where many vectors are one call (measured from 576x576, where it is too few, to 5632x2048: too many).
MOST_BESIDE_BUNDLES = {2: 20, 1: 24}
MOST_TRELLIS_VECTORS = 16
# Weights that are decoded at a time for that: the dense weight never exists as a whole beside its codes.
DECODED_WEIGHTS = 1 << 22


@functools.lru_cache(maxsize=512)
def _kernel_transform(
    incoherence: str, size: int, seed: int
) -> tuple[kernels.Transform | None, transforms.Transform | None]:
    """The transform as the library takes it, or as PyTorch applies it; neither for the identity."""
    q = transforms.get(incoherence, size, seed)
    if q.is_identity:
        return None, None
    if q.dense_factors is None:
        return None, q
    return kernels.Transform(q.dense_factors), None


def _is_covered(codebook: str, dtype: torch.dtype) -> bool:
    """Whether the library computes layers of this codebook for activations of this dtype."""
    if dtype not in kernels.DTYPES or get_backend() not in ("auto", "cpu"):
        return False
    if codebooks.get(codebook).kernels is None:
        _tell(f"the CPU library has no kernels for codebook {codebook!r}")
        return False
    if not cpu_kernels.is_available():
        _tell("there is no compiled CPU library (it is built where a C compiler is found at install time)")
        return False
    return True


@functools.cache
def _tell(reason: str) -> None:
    logger.info("%s: quantized layers run through PyTorch, which is slower", reason)


def planes_for(dtype: torch.dtype) -> int:
    """In how many bytes activations of this dtype are multiplied: "exact" keeps more bits than the dtype has."""
    if get_activations() == "int8" or (get_activations() == "auto" and dtype != torch.float32):
        return 1
    return 3 if dtype == torch.float32 else 2


def transform(x: torch.Tensor, incoherence: str, seed: int, transpose: bool) -> torch.Tensor:
    """See [`reference.transform`]; computed in float32."""
    if x.numel() == 0 or not _is_covered("e8p", x.dtype):
        return reference.transform(x, incoherence, seed, transpose)
    q, _ = _kernel_transform(incoherence, x.shape[-1], seed)
    return reference.transform(x, incoherence, seed, transpose) if q is None else kernels.transform(x, q, transpose)


def decode(weight: Sequence[torch.Tensor], codebook: str, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """See [`reference.decode`]."""
    if not _is_covered(codebook, dtype) or _is_wide(weight):
        return reference.decode(weight, codebook, rows, columns, dtype)
    book = codebooks.get(codebook)
    tensors = named(stored(weight, codebook, columns), book, rows, columns)
    if book.kernels == "trellis":
        return trellis_kernels.decode(tensors["codes"], columns, dtype, _trellis_layout(codebook), tensors.get("table"))
    codes, second = stages(list(tensors.values()))
    return kernels.decode(codes, columns, dtype, None, None, second, book.residual_scale or 1.0)


def linear(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    """See [`reference.linear`]. One call into the library for few vectors; for many, products with decoded rows."""
    layer = Layer(*arguments)
    n, m, book = layer.n, layer.m, layer.book
    if layer.weight[0].dtype is torch.int32:  # may be packed; no codes that kernels take are stored so
        layer = layer._replace(weight=stored(layer.weight, layer.codebook, n))
    if book.kernels == "trellis":
        return _trellis_linear(x, layer)
    planes = _planes(x.dtype, layer)
    vectors = x.numel() // n
    if planes is None or vectors == 0 or n > kernels.MOST_FEATURES:
        return reference.linear(x, *layer)
    su, sv, bias = layer.su, layer.sv, layer.bias
    codes, second = stages(layer.weight)
    scale = book.residual_scale or 1.0
    q_in, slow_in = _kernel_transform(layer.incoherence_in, n, layer.seed)
    q_out, slow_out = _kernel_transform(layer.incoherence_out, m, layer.seed)
    is_slow = slow_in is not None or slow_out is not None
    int8 = _is_int8(planes, layer)
    in_bundles = not is_slow and many_kernels.takes(x.dtype, m, n, int8)
    if vectors > _most_vectors(planes, in_bundles):
        if in_bundles:
            tensors = tuple(map(kernels.contiguous, (codes, second, su, sv, bias)))
            rows = kernels.rows_of(x, n)
            description, address, _, _ = kernels.layer_of(rows, tensors, q_in, q_out, scale)
            y = bundled(x, rows, su, address, m, q_in, int8)
            del description, tensors  # had to live until here
            return y
        decode = functools.partial(_decode_rows, codes, second=second, residual_scale=scale)
        return _many_vectors(x, su, sv, bias, (q_in, slow_in), (q_out, slow_out), decode)
    stage = (planes, None, None, second, scale)
    if not is_slow:
        return kernels.linear(x, codes, su, sv, bias, q_in, q_out, *stage)
    t = _transform_in(x, su, q_in, slow_in, torch.empty(x.shape))
    z = kernels.linear(t, codes, None, None, None, None, None, *stage)
    return _transform_out(z, sv, bias, q_out, slow_out, x.dtype)


class OneCall(NamedTuple):
    """A call of the library for few vectors: function(address, x, y, how many, *arguments, threads), which returns 0.

    bundles: what [`bundled`] needs for more of them, None where they take another way.
    """

    function: Callable[..., int]
    address: int
    arguments: tuple[int, ...]
    m: int
    n: int
    most: int  # vectors
    bundles: tuple[kernels.Transform | None, bool] | None  # the input's transform, and whether they become int8
    keep: object  # what lies at the address, and what that points to


def one_call(x: torch.Tensor, layer: Layer) -> OneCall | None:
    """The calls of the library that [`linear`] is for inputs as x, if x is one; all tensors contiguous and on the CPU."""
    family = layer.book.kernels
    if family is None or not _are_stored(layer) or layer.n > kernels.MOST_FEATURES:
        return None
    n, m, su, sv, bias = layer.n, layer.m, layer.su, layer.sv, layer.bias
    q_in, slow_in = _kernel_transform(layer.incoherence_in, n, layer.seed)
    q_out, slow_out = _kernel_transform(layer.incoherence_out, m, layer.seed)
    if slow_in is not None or slow_out is not None:
        return None
    in_bundles = int8 = False
    if family == "e8p":
        planes = _planes(x.dtype, layer)
        fits = planes is not None
        int8 = fits and _is_int8(planes, layer)
        in_bundles = fits and many_kernels.takes(x.dtype, m, n, int8)
        most = _most_vectors(planes, in_bundles) if fits else 0
    else:
        fits = not _has_wide_vectors(layer) and not _is_wide(layer.weight)
        most = MOST_TRELLIS_VECTORS if fits and _is_covered(layer.codebook, x.dtype) else 0
    vectors = x.numel() // n
    if most == 0 or vectors == 0 or (vectors > most and not in_bundles):
        return None
    kind = kernels.DTYPES[x.dtype]
    if family == "e8p":
        tensors, scale = (*stages(layer.weight), su, sv, bias), layer.book.residual_scale or 1.0
        keep, address, _, _ = kernels.layer_of(x.reshape(-1, n), tensors, q_in, q_out, scale)
        function, arguments = library().quip_linear, (n, kind, kind, planes, default_level())
    else:
        codes, table = stages(layer.weight)
        layout = _trellis_layout(layer.codebook)
        keep, address, _ = trellis_kernels.layer_of(n, (codes, su, sv, bias, table), q_in, q_out, layout)
        function, arguments = library().quip_trellis_linear, (n, kind, kind, default_level())
    bundles = (q_in, int8) if in_bundles else None
    return OneCall(function, address, arguments, m, n, most, bundles, (keep, q_in, q_out))


def _decode_rows(
    codes: torch.Tensor,
    rows: slice,
    dtype: torch.dtype,
    out: torch.Tensor,
    second: torch.Tensor | None,
    residual_scale: float,
) -> torch.Tensor:
    """Some rows of the weight of codes, written to `out`."""
    rest = None if second is None else second[rows]
    return kernels.decode(codes[rows], out.shape[1], dtype, None, out, rest, residual_scale)


def _trellis_linear(x: torch.Tensor, layer: Layer) -> torch.Tensor:
    """[`linear`] for trellis codes. Between the transforms activations are float32, whatever they are outside."""
    n, m, su, sv, bias = layer.n, layer.m, layer.su, layer.sv, layer.bias
    vectors = x.numel() // n
    is_wide = _has_wide_vectors(layer) or _is_wide(layer.weight)
    if is_wide or vectors == 0 or not _is_covered(layer.codebook, x.dtype):
        return reference.linear(x, *layer)
    tensors = named(layer.weight, layer.book, m, n)
    codes, table = tensors["codes"], tensors.get("table")
    layout = _trellis_layout(layer.codebook)
    q_in, slow_in = both_in = _kernel_transform(layer.incoherence_in, n, layer.seed)
    q_out, slow_out = both_out = _kernel_transform(layer.incoherence_out, m, layer.seed)
    if vectors > MOST_TRELLIS_VECTORS:

        def decode(rows: slice, dtype: torch.dtype, out: torch.Tensor) -> torch.Tensor:
            return trellis_kernels.decode(codes[rows], n, dtype, layout, table, out=out)

        return _many_vectors(x, su, sv, bias, both_in, both_out, decode)
    if slow_in is None and slow_out is None:
        return trellis_kernels.linear(x, codes, su, sv, bias, q_in, q_out, layout, table)
    t = _transform_in(x, su, q_in, slow_in, torch.empty(x.shape))
    return _transform_out(trellis_kernels.products(t, codes, layout, table), sv, bias, q_out, slow_out, x.dtype)


@functools.cache
def _trellis_layout(codebook: str) -> trellis_kernels.Layout:
    """The codes of a trellis codebook as the library takes them."""
    book: Any = codebooks.get(codebook)
    return trellis_kernels.Layout(book.code, book.k, book.order)


def _is_wide(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether one of these is floating point of a type that the library does not take."""
    return any(v.dtype not in kernels.DTYPES and v.is_floating_point() for v in tensors)


def _has_wide_vectors(layer: Layer) -> bool:
    """The same of su, sv and the bias."""
    known, bias = kernels.DTYPES, layer.bias
    return layer.su.dtype not in known or layer.sv.dtype not in known or (bias is not None and bias.dtype not in known)


def _are_stored(layer: Layer) -> bool:
    """Whether these are as many tensors as the codebook stores, with its types of integers; sizes are not looked at."""
    dtypes = integer_dtypes(layer.codebook)
    if len(layer.weight) != len(dtypes):
        return False
    for tensor, dtype in zip(layer.weight, dtypes, strict=True):
        if dtype is not None and tensor.dtype is not dtype:
            return False
    return True


def _planes(dtype: torch.dtype, layer: Layer) -> int | None:
    """In how many bytes activations of this dtype are multiplied; None where the library has no kernel."""
    if not _is_covered(layer.codebook, dtype) or _has_wide_vectors(layer):
        return None
    if not _are_stored(layer):
        return None  # the reference says why
    return planes_for(dtype)


def _many_vectors(
    x: torch.Tensor,
    su: torch.Tensor,
    sv: torch.Tensor,
    bias: torch.Tensor | None,
    transform_in: tuple,
    transform_out: tuple,
    decode: Callable[[slice, torch.dtype, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """The layer through matrix products with decoded rows; in bfloat16 for bfloat16 x, as a dense layer, else float32.

    decode: writes some rows of the weight in this dtype to the tensor, and returns it. It is asked for whole tiles.
    """
    n, m = su.shape[0], sv.shape[0]
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    vectors = x.reshape(-1, n)
    t = scratch.rotated(x, su, transform_in, vectors.shape, dtype)
    if t is None:
        t = _transform_in(vectors, su, *transform_in, scratch.scratch("rotated inputs", vectors.shape, dtype))
        scratch.keep_rotated(x, su, transform_in, t)
    z = scratch.scratch("rotated outputs", (len(t), m), dtype)
    rows = min(m, max(1, DECODED_WEIGHTS // n // TILE) * TILE)
    for begin in range(0, m, rows):
        count = min(rows, m - begin)
        decoded = scratch.scratch("decoded rows", (count, n), dtype)
        weight = decode(slice(begin, begin + count), dtype, decoded)
        if rows >= m:
            torch.mm(t, weight.T, out=z)
        else:
            block = scratch.scratch("block of outputs", (len(t), count), dtype)
            z[:, begin : begin + count] = torch.mm(t, weight.T, out=block)
    return _transform_out(z, sv, bias, *transform_out, x.dtype).reshape(*x.shape[:-1], m)


def _most_vectors(planes: int, in_bundles: bool) -> int:
    """Up to how many vectors are multiplied by the codes; in_bundles: what becomes of more."""
    return min(MOST_VECTORS[planes], MOST_BESIDE_BUNDLES[planes]) if in_bundles else MOST_VECTORS[planes]


def _is_int8(planes: int, layer: Layer) -> bool:
    """Whether many vectors are multiplied in 8 bits, which is done for codes of one stage."""
    return planes == 1 and len(layer.weight) == 1


def bundled(
    x: torch.Tensor,
    rows: torch.Tensor,
    su: torch.Tensor,
    address: int,
    m: int,
    q_in: kernels.Transform | None,
    int8: bool,
) -> torch.Tensor:
    """Many vectors in one call, which computes the rotated inputs unless they are there already.

    Args:
        x: [..., n]. rows: the same, [vectors, n] or contiguous, with neighbours in memory along the last dimension.
        address: of the layer's description. q_in: the transform of its inputs.
        int8: whether they are multiplied in 8 bits.
    """
    n, threads = x.shape[-1], torch.get_num_threads()
    vectors = x.numel() // n
    plan = many_kernels.plan(vectors, m, n, int8, threads)
    memory = scratch.scratch("workspace", (plan.workspace,), torch.float32)
    t = scratch.rotated(x, su, q_in, plan.rotated_shape, torch.int32)
    is_rotated = t is not None
    if not is_rotated:
        t = scratch.scratch("rotated inputs", plan.rotated_shape, torch.int32)
    y = x.new_empty((*x.shape[:-1], m))
    stride = n if rows is x else rows.stride(0)
    many_kernels.run(address, rows, y, vectors, stride, t, is_rotated, int8, memory, plan, threads)
    if not is_rotated:
        scratch.keep_rotated(x, su, q_in, t)
    return y


def eager_bundled(x: torch.Tensor, *arguments) -> torch.Tensor:
    """[`bundled`] for contiguous x and a call that is not made by compiled code."""
    scratch.set_eager(True)
    try:
        return bundled(x, x, *arguments)
    finally:
        scratch.set_eager(False)


def eager_linear(x: torch.Tensor, *arguments) -> torch.Tensor:
    """[`linear`] for a call that is not made by compiled code: its input may be that of the call before."""
    scratch.set_eager(True)
    try:
        return linear(x, *arguments)
    finally:
        scratch.set_eager(False)


def _transform_in(
    x: torch.Tensor,
    su: torch.Tensor,
    q: kernels.Transform | None,
    slow: transforms.Transform | None,
    out: torch.Tensor,
) -> torch.Tensor:
    """Q_inᵀ( su ⊙ x ), written to `out`."""
    if q is not None:
        return kernels.transform(x, q, True, before=su, out=out)
    t = x.float() * su.float()
    return out.copy_(t if slow is None else slow.apply_transpose(t))


def _transform_out(
    z: torch.Tensor,
    sv: torch.Tensor,
    bias: torch.Tensor | None,
    q: kernels.Transform | None,
    slow: transforms.Transform | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """sv ⊙ Q_out(z) + bias in this dtype."""
    if q is not None:
        return kernels.transform(z, q, after=sv, bias=bias, dtype=dtype)
    y = (z.float() if slow is None else slow.apply(z.float())) * sv.float()
    return (y if bias is None else y + bias.float()).to(dtype)


def register() -> None:
    """Make these the implementation for tensors on the CPU."""
    for function in (transform, decode, linear):
        torch.library.impl(f"quip::{function.__name__}", "cpu", function)
