"""The ops on the CPU: which kernel of the compiled library computes them, and when the reference does."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable
from typing import NamedTuple

import torch

from quip_kernels import cpu as cpu_kernels
from quip_kernels import cpu_linear as kernels
from quip_kernels import cpu_many as many_kernels
from quip_kernels import cpu_trellis as trellis_kernels
from quip_kernels.cpu_library import default_level, library

from ... import codebooks
from ... import incoherence as transforms
from ...codebooks.trellis import TILE, Trellis
from .. import reference
from ..backend import get_activations, get_backend
from ..packing import logical
from ..same_input import SameInput
from . import scratch

logger = logging.getLogger(__name__)

# Codebooks that the library knows, and the type of their second stage's codes.
CODEBOOKS = {"e8p": None, "e8p-rvq3": torch.uint8, "e8p-rvq4": torch.int16}
# Up to so many vectors, by the planes of activations, products with the codes are faster than decoding the weight and a
# matrix product with it (measured at 1536x576 and 2048x2048 with AVX-512; the bfloat16 product is the faster one).
MOST_VECTORS = {3: 64, 2: 40, 1: 64}
# The same where many vectors are one call (measured from 576x576, where it is too few, to 5632x2048: too many).
MOST_BESIDE_BUNDLES = {2: 20, 1: 24}
MOST_TRELLIS_VECTORS = 16
# Weights that are decoded at a time for that: the dense weight never exists as a whole beside its codes.
DECODED_WEIGHTS = 1 << 22

_threads = threading.local()


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
    if codebook not in CODEBOOKS and _trellis_layout(codebook) is None:
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


def decode(
    codes: torch.Tensor,
    codes_residual: torch.Tensor | None,
    codebook: str,
    columns: int,
    dtype: torch.dtype,
    residual_scale: float | None = None,
    table: torch.Tensor | None = None,
) -> torch.Tensor:
    """See [`reference.decode`]."""
    if not _is_covered(codebook, dtype) or _is_wide(table):
        return reference.decode(codes, codes_residual, codebook, columns, dtype, residual_scale, table)
    codes, codes_residual = logical(codes, codes_residual, codebook, columns)
    reference.check_codes(codes, codes_residual, codebook, columns, table)
    layout = _trellis_layout(codebook)
    if layout is not None:
        return trellis_kernels.decode(codes, columns, dtype, layout, table)
    scale = _residual_scale(codebook, residual_scale)
    return kernels.decode(codes, columns, dtype, codes_residual=codes_residual, residual_scale=scale)


def linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    codes_residual: torch.Tensor | None,
    su: torch.Tensor,
    sv: torch.Tensor,
    bias: torch.Tensor | None,
    codebook: str,
    incoherence_in: str,
    incoherence_out: str,
    seed: int,
    residual_scale: float | None = None,
    table: torch.Tensor | None = None,
) -> torch.Tensor:
    """See [`reference.linear`]. One call into the library for few vectors; for many, products with decoded rows."""
    n, m = su.shape[0], sv.shape[0]
    codes, codes_residual = logical(codes, codes_residual, codebook, n)
    layout = _trellis_layout(codebook)
    if layout is not None:
        return _trellis_linear(
            x, codes, codes_residual, su, sv, bias, codebook, incoherence_in, incoherence_out, seed, layout, table
        )
    planes = _planes(codebook, codes_residual, x.dtype, su.dtype, sv.dtype, None if bias is None else bias.dtype)
    vectors = x.numel() // n
    if planes is None or vectors == 0 or n > kernels.MOST_FEATURES or table is not None:
        names = (codebook, incoherence_in, incoherence_out, seed)
        return reference.linear(x, codes, codes_residual, su, sv, bias, *names, residual_scale, table)
    q_in, slow_in = _kernel_transform(incoherence_in, n, seed)
    q_out, slow_out = _kernel_transform(incoherence_out, m, seed)
    second = {"codes_residual": codes_residual, "residual_scale": _residual_scale(codebook, residual_scale)}
    is_slow = slow_in is not None or slow_out is not None
    int8 = _is_int8(planes, codes_residual)
    in_bundles = not is_slow and many_kernels.takes(x.dtype, m, n, int8)
    if vectors > _most_vectors(planes, in_bundles):
        if in_bundles:
            tensors = tuple(map(kernels.contiguous, (codes, codes_residual, su, sv, bias)))
            rows = kernels.rows_of(x, n)
            layer, address, _, _ = kernels.layer_of(rows, tensors, q_in, q_out, second["residual_scale"])
            y = bundled(x, rows, su, address, m, q_in, int8)
            del layer, tensors  # had to live until here
            return y
        decode = functools.partial(_decode_rows, codes, **second)
        return _many_vectors(x, su, sv, bias, (q_in, slow_in), (q_out, slow_out), decode)
    if not is_slow:
        return kernels.linear(x, codes, su, sv, bias, q_in, q_out, planes, **second)
    t = _transform_in(x, su, q_in, slow_in, torch.empty(x.shape))
    z = kernels.linear(t, codes, None, None, None, None, None, planes, **second)
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


def one_call(
    x: torch.Tensor,
    codes: torch.Tensor,
    codes_residual: torch.Tensor | None,
    su: torch.Tensor,
    sv: torch.Tensor,
    bias: torch.Tensor | None,
    codebook: str,
    incoherence_in: str,
    incoherence_out: str,
    seed: int,
    residual_scale: float | None,
    table: torch.Tensor | None,
) -> OneCall | None:
    """The calls of the library that [`linear`] is for inputs as x, if x is one; all tensors contiguous and on the CPU."""
    layout = _trellis_layout(codebook)
    if (codebook not in CODEBOOKS and layout is None) or codes.dtype != torch.int16 or su.shape[0] > kernels.MOST_FEATURES:
        return None
    n, m = su.shape[0], sv.shape[0]
    dtypes = (x.dtype, su.dtype, sv.dtype, None if bias is None else bias.dtype)
    q_in, slow_in = _kernel_transform(incoherence_in, n, seed)
    q_out, slow_out = _kernel_transform(incoherence_out, m, seed)
    if slow_in is not None or slow_out is not None:
        return None
    in_bundles = int8 = False
    if layout is None:
        planes = _planes(codebook, codes_residual, *dtypes)
        fits = planes is not None
        int8 = fits and _is_int8(planes, codes_residual)
        in_bundles = fits and many_kernels.takes(x.dtype, m, n, int8)
        most = _most_vectors(planes, in_bundles) if fits else 0
    else:
        fits = all(v is None or v in kernels.DTYPES for v in dtypes) and not _is_wide(table)
        most = MOST_TRELLIS_VECTORS if fits and _is_covered(codebook, x.dtype) else 0
    vectors = x.numel() // n
    if most == 0 or vectors == 0 or (vectors > most and not in_bundles):
        return None
    kind = kernels.DTYPES[x.dtype]
    if layout is None:
        tensors, scale = (codes, codes_residual, su, sv, bias), _residual_scale(codebook, residual_scale)
        keep, address, _, _ = kernels.layer_of(x.reshape(-1, n), tensors, q_in, q_out, scale)
        function, arguments = library().quip_linear, (n, kind, kind, planes, default_level())
    else:
        keep, address, _ = trellis_kernels.layer_of(n, (codes, su, sv, bias, table), q_in, q_out, layout)
        function, arguments = library().quip_trellis_linear, (n, kind, kind, default_level())
    bundles = (q_in, int8) if in_bundles else None
    return OneCall(function, address, arguments, m, n, most, bundles, (keep, q_in, q_out))


def _decode_rows(
    codes: torch.Tensor,
    rows: slice,
    dtype: torch.dtype,
    out: torch.Tensor,
    codes_residual: torch.Tensor | None,
    residual_scale: float,
) -> torch.Tensor:
    """Some rows of the weight of codes, written to `out`."""
    rest = None if codes_residual is None else codes_residual[rows]
    return kernels.decode(codes[rows], out.shape[1], dtype, None, out, rest, residual_scale)


def _trellis_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    codes_residual: torch.Tensor | None,
    su: torch.Tensor,
    sv: torch.Tensor,
    bias: torch.Tensor | None,
    codebook: str,
    incoherence_in: str,
    incoherence_out: str,
    seed: int,
    layout: trellis_kernels.Layout,
    table: torch.Tensor | None,
) -> torch.Tensor:
    """[`linear`] for trellis codes. Between the transforms activations are float32, whatever they are outside."""
    n, m = su.shape[0], sv.shape[0]
    vectors = x.numel() // n
    vectors_fit = all(v is None or v.dtype in kernels.DTYPES for v in (su, sv, bias, table))
    if not vectors_fit or vectors == 0 or not _is_covered(codebook, x.dtype):
        names = (codebook, incoherence_in, incoherence_out, seed)
        return reference.linear(x, codes, codes_residual, su, sv, bias, *names, None, table)
    shapes = (codes.shape[1:], None if table is None else table.shape)
    book = codebooks.get(codebook)
    if codes_residual is not None or shapes != ((n // TILE * book.k,), book.table_shape) or codes.dtype != book.code_dtype:
        reference.check_codes(codes, codes_residual, codebook, n, table)  # says what is wrong
    both = (_kernel_transform(incoherence_in, n, seed), _kernel_transform(incoherence_out, m, seed))
    if vectors > MOST_TRELLIS_VECTORS:

        def decode(rows: slice, dtype: torch.dtype, out: torch.Tensor) -> torch.Tensor:
            return trellis_kernels.decode(codes[rows], n, dtype, layout, table, out=out)

        return _many_vectors(x, su, sv, bias, *both, decode)
    (q_in, slow_in), (q_out, slow_out) = both
    if slow_in is None and slow_out is None:
        return trellis_kernels.linear(x, codes, su, sv, bias, q_in, q_out, layout, table)
    t = _transform_in(x, su, q_in, slow_in, torch.empty(x.shape))
    return _transform_out(trellis_kernels.products(t, codes, layout, table), sv, bias, q_out, slow_out, x.dtype)


@functools.cache
def _trellis_layout(codebook: str) -> trellis_kernels.Layout | None:
    """The codes of a trellis codebook as the library takes them; None for another codebook."""
    book = codebooks.get(codebook)
    return trellis_kernels.Layout(book.code, book.k, book.order) if isinstance(book, Trellis) else None


def _is_wide(table: torch.Tensor | None) -> bool:
    """Whether a table has a type that the library does not take."""
    return table is not None and table.dtype not in kernels.DTYPES


def _residual_scale(codebook: str, residual_scale: float | None) -> float:
    """What multiplies the second stage's points; any number for a codebook of one stage."""
    return codebooks.get(codebook, residual_scale).residual_scale or 1.0


def _planes(codebook: str, codes_residual: torch.Tensor | None, *dtypes: torch.dtype | None) -> int | None:
    """In how many bytes activations (of the first dtype) are multiplied; None where the library has no kernel."""
    if not _is_covered(codebook, dtypes[0]):
        return None
    if CODEBOOKS[codebook] != (None if codes_residual is None else codes_residual.dtype):
        return None  # the reference says what is wrong
    if any(dtype is not None and dtype not in kernels.DTYPES for dtype in dtypes[1:]):
        return None
    return planes_for(dtypes[0])


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
    shared, key = _rotated(), (transform_in, vectors.shape, dtype)
    t = shared.take(su, (x, su), key)
    if t is None:
        t = _transform_in(vectors, su, *transform_in, scratch.scratch("rotated inputs", vectors.shape, dtype))
        shared.keep(su, (x, su), key, t)
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


def _is_int8(planes: int, codes_residual: torch.Tensor | None) -> bool:
    """Whether many vectors are multiplied in 8 bits, which is done for codes of one stage."""
    return planes == 1 and codes_residual is None


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
    shared, key = _rotated(), (q_in, plan.rotated_shape, torch.int32)
    t = shared.take(su, (x, su), key)
    is_rotated = t is not None
    if t is None:
        t = scratch.scratch("rotated inputs", plan.rotated_shape, torch.int32)
    y = x.new_empty((*x.shape[:-1], m))
    stride = n if rows is x else rows.stride(0)
    many_kernels.run(address, rows, y, vectors, stride, t, is_rotated, int8, memory, plan, threads)
    if not is_rotated:
        shared.keep(su, (x, su), key, t)
    return y


def _rotated() -> SameInput[torch.Tensor]:
    """What this thread rotated last, Q_inᵀ( su ⊙ x ), for linears that read the same x and have equal su (q, k and v).

    For few vectors, where the rotation is a part of the library's call, sharing would save less than it costs.
    """
    shared = getattr(_threads, "rotated", None)
    if shared is None:
        shared = _threads.rotated = SameInput(scratch.scratch)
    return shared


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
