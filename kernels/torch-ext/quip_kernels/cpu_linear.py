"""Linear layers of E8P codes, with or without a second stage, on the CPU: the fused layer, its transforms alone, and the
decoded weight.

The layer is one call into the compiled library (`cpu.is_available`): su ⊙ x, the input transform, the products with
the codes, the output transform, sv and bias. The transformed vector is written as integers of `8·planes` bits times a
scale of its own, and the products are exact sums of integers: with three planes (24 bits) the result has the accuracy
of float32 arithmetic, with two (16 bits) an error of about 4e-5 of the output's size, with one (8 bits) 0.9 %.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import TypeVar

import torch

from . import cpu_nibbles
from .cpu import SECOND_STAGES
from .cpu_layers import description
from .cpu_library import MOST_FACTORS, LayerArguments, TransformArguments, TransformCall, default_level, loaded

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
PLANES = (1, 2, 3)
_LEAST_SIGNS, _MOST_SIGNS = 28, 128  # with fewer, plain products are as fast; with more, addresses do not fit
MOST_FEATURES = 1 << 18  # inputs of a layer, fixed in the C source
# The number of the second stage that codes of this type belong to; see `cpu.SECOND_STAGES`.
_SECOND = {torch.uint8: SECOND_STAGES["e8"], torch.int16: SECOND_STAGES["e8p"]}


_Tensor = TypeVar("_Tensor", torch.Tensor, torch.Tensor | None)
# codes, codes_residual, su, sv, bias
LayerTensors = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


class Transform:
    """An orthogonal matrix Q, the Kronecker product of small factors, in the form that the library takes.

    Args:
        factors: square orthogonal matrices, Q = F₁ ⊗ F₂ ⊗ …, at most 8 that are not a Sylvester-Hadamard matrix. Those
            at the end that are one, scaled to be orthogonal, become a fast Walsh-Hadamard transform.
    """

    def __init__(self, factors: Sequence[torch.Tensor]):
        dense, power = list(factors), 1
        while dense and _is_sylvester(dense[-1]):
            power *= dense.pop().shape[0]
        if len(dense) > MOST_FACTORS:
            raise ValueError(f"a transform of {len(dense)} dense factors, at most {MOST_FACTORS} can be")
        self.size = power * math.prod(factor.shape[0] for factor in dense)
        # the pointers' owners
        self._kept = [(f.float().contiguous(), f.float().T.contiguous(), _signs(f), _signs(f.T)) for f in dense]
        arguments = TransformArguments(size=self.size, count=len(dense), power=power)
        for i, (factor, transposed, signs, signs_transposed) in enumerate(self._kept):
            arguments.orders[i] = factor.shape[0]
            arguments.factors[i], arguments.transposed[i] = factor.data_ptr(), transposed.data_ptr()
            if signs is not None and signs_transposed is not None:
                arguments.signs[i], arguments.signs_transposed[i] = signs.data_ptr(), signs_transposed.data_ptr()
        self._arguments = arguments
        self.address = ctypes.addressof(arguments)


def linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    su: torch.Tensor | None,
    sv: torch.Tensor | None,
    bias: torch.Tensor | None,
    transform_in: Transform | None,
    transform_out: Transform | None,
    planes: int = 3,
    dtype: torch.dtype | None = None,
    level: int | None = None,
    codes_residual: torch.Tensor | None = None,
    residual_scale: float = 1.0,
) -> torch.Tensor:
    """y = sv ⊙ Q_out( Ŵ · Q_inᵀ( su ⊙ x ) ) + bias for E8P codes; a part that is None is left out.

    With a second stage, Ŵ is the weight of the E8P codes plus `residual_scale` times the weight of `codes_residual`.

    Meant for few vectors: every vector is multiplied by the codes themselves, independently of the other vectors.
    The result does not depend on the number of threads.

    Args:
        x: float32, bfloat16 or float16 [..., n], n at most 2¹⁸.
        codes: int16 [m, ⌈n/8⌉], or the nibbles that they are expanded to (`cpu_nibbles`); the result is the same.
        su: [n]; sv, bias: [m]; each float32, bfloat16 or float16.
        transform_in, transform_out: of sizes n and m.
        planes: 3 for the accuracy of float32; 2 or 1 for activations of 16 or 8 bits.
        dtype: of the result; None: the dtype of x.
        level: instruction set, an index of `cpu_library.LEVELS`; None: [`default_level`].
        codes_residual: of the shape of codes; int16 for E8P again, uint8 for the one-byte E8; or nibbles.

    Returns:
        [..., m]. A vector with an entry that is not finite gives NaN.

    Raises:
        ValueError: a tensor is not as described.
    """
    vectors = x if x.is_contiguous() else rows_of(x, x.shape[-1])
    codes, su, sv, bias = contiguous(codes), contiguous(su), contiguous(sv), contiguous(bias)
    codes_residual = contiguous(codes_residual)
    tensors = (codes, codes_residual, su, sv, bias)
    n, m = x.shape[-1], shape_of(codes)[0]
    layer, address = layer_of(n, tensors, transform_in, transform_out, residual_scale)
    if planes not in PLANES:
        raise ValueError(f"planes={planes} must be 1, 2 or 3")
    y = x.new_empty(*x.shape[:-1], m) if dtype is None else x.new_empty((*x.shape[:-1], m), dtype=dtype)
    count = x.numel() // n
    failed = loaded().quip_linear(
        address,
        vectors.data_ptr(),
        y.data_ptr(),
        count,
        n if vectors is x else vectors.stride(0),
        type_of(vectors, "x"),
        type_of(y, "the result"),
        planes,
        default_level() if level is None else level,
        torch.get_num_threads(),
    )
    del layer  # kept alive until here, even if another thread drops it from the cache
    if failed:
        raise MemoryError(f"no memory for {count} vectors of {n} inputs and {m} outputs")
    return y


def contiguous(v: _Tensor) -> _Tensor:
    return v if v is None or v.is_contiguous() else v.contiguous()


def layer_of(
    n: int,
    tensors: LayerTensors,
    transform_in: Transform | None,
    transform_out: Transform | None,
    residual_scale: float,
) -> tuple[LayerArguments, int]:
    """The layer's description for the library and its address (`cpu_layers.description`).

    Args:
        tensors: codes, codes_residual, su, sv, bias, all contiguous.
    """
    return description(_describe, tensors, n, transform_in, transform_out, residual_scale)


def _describe(
    tensors: LayerTensors,
    n: int,
    transform_in: Transform | None,
    transform_out: Transform | None,
    residual_scale: float,
) -> LayerArguments:
    """See [`layer_of`]. Raises `ValueError` for a tensor that is not as [`linear`] describes it."""
    codes, codes_residual, su, sv, bias = tensors
    second, nibbles = _check_codes(codes, codes_residual, n)
    m = shape_of(codes)[0]
    if not m:
        raise ValueError(f"codes must be int16 [m, {-(-n // 8)}] of at least one row, got {list(codes.shape)}")
    if not 0 < n <= MOST_FEATURES:
        raise ValueError(f"the inputs must be 1 to {MOST_FEATURES}, got {n}")
    for transform, size in ((transform_in, n), (transform_out, m)):
        if transform is not None and transform.size != size:
            raise ValueError(f"a transform of size {transform.size} was given for {size} features")
    types = [vector_type(v, size, name) for v, size, name in ((su, n, "su"), (sv, m, "sv"), (bias, m, "bias"))]
    return LayerArguments(
        *(None if v is None else v.data_ptr() for v in tensors),
        *(None if q is None else q.address for q in (transform_in, transform_out)),
        n,
        m,
        residual_scale,
        *types,
        second,
        nibbles,
    )


def transform(
    x: torch.Tensor,
    q: Transform,
    transpose: bool = False,
    before: torch.Tensor | None = None,
    after: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """after ⊙ Q( before ⊙ x ) + bias along the last dimension (Qᵀ if `transpose`), computed in float32.

    Args:
        x: float32, bfloat16 or float16 [..., n].
        before, after, bias: [n] of such a dtype, or None.
        dtype: of the result; None: the dtype of x.
        out: a contiguous tensor [..., n] to write to, of such a dtype (then `dtype` is not read); None: a new one.

    Raises:
        ValueError: a tensor is not as described.
    """
    n = q.size
    if x.shape[-1] != n:
        raise ValueError(f"expected [..., {n}], got {list(x.shape)}")
    vectors = rows_of(x, n)
    y = torch.empty(x.shape, dtype=dtype or x.dtype) if out is None else out
    if y.shape != x.shape or not y.is_contiguous():
        raise ValueError(f"out must be a contiguous {list(x.shape)}, got {list(y.shape)}")
    types = [vector_type(v, n, name) for v, name in ((before, "before"), (after, "after"), (bias, "bias"))]
    given = [v if v is None else v.contiguous() for v in (before, after, bias)]
    call = TransformCall(
        vectors.data_ptr(),
        y.data_ptr(),
        *(None if v is None else v.data_ptr() for v in given),
        q.address,
        vectors.shape[0],
        vectors.stride(0),
        type_of(vectors, "x"),
        type_of(y, "the result"),
        *types,
        transpose,
        torch.get_num_threads(),
    )
    if loaded().quip_transform_vectors(ctypes.byref(call)):
        raise MemoryError(f"no memory to transform {vectors.shape[0]} vectors of {n} numbers")
    return y


def decode(
    codes: torch.Tensor,
    columns: int,
    dtype: torch.dtype,
    level: int | None = None,
    out: torch.Tensor | None = None,
    codes_residual: torch.Tensor | None = None,
    residual_scale: float = 1.0,
) -> torch.Tensor:
    """The weight Ŵ [m, columns] of E8P codes int16 [m, ⌈columns/8⌉] or nibbles, in float32, bfloat16 or float16.

    It is exact without a second stage; with one (see [`linear`]) it is computed in float32 and rounded to the dtype.

    Raises:
        ValueError: codes or the dtype are not as described.
    """
    second, nibbles = _check_codes(codes, codes_residual, columns)
    codes, codes_residual, rows = codes.contiguous(), contiguous(codes_residual), shape_of(codes)[0]
    weight = torch.empty(rows, columns, dtype=dtype) if out is None else out
    if weight.shape != (rows, columns) or not weight.is_contiguous():
        raise ValueError(f"out must be a contiguous {[rows, columns]}, got {list(weight.shape)}")
    loaded().quip_decode(
        codes.data_ptr(),
        None if codes_residual is None else codes_residual.data_ptr(),
        second,
        residual_scale,
        rows,
        columns,
        weight.data_ptr(),
        type_of(weight, "the weight"),
        nibbles,
        default_level() if level is None else level,
        torch.get_num_threads(),
    )
    return weight


def shape_of(codes: torch.Tensor) -> tuple[int, ...]:
    """Rows and blocks of codes or nibbles."""
    return cpu_nibbles.shape_of_codes(codes) if cpu_nibbles.is_nibbles(codes) else tuple(codes.shape)


def _check_codes(codes: torch.Tensor, codes_residual: torch.Tensor | None, n: int) -> tuple[int, int]:
    """The library's number of the second stage, and of the stages in nibbles. Raises `ValueError` for other tensors."""
    shape = shape_of(codes)
    if cpu_nibbles.codes_dtype(codes) != torch.int16 or len(shape) != 2 or shape[1] != -(-n // 8) or not codes.is_cpu:
        raise ValueError(
            f"codes for {n} inputs must be int16 [m, {-(-n // 8)}] on the CPU, got {codes.dtype} {list(codes.shape)} on "
            f"{codes.device}"
        )
    nibbles = cpu_nibbles.FIRST * cpu_nibbles.is_nibbles(codes)
    if codes_residual is None:
        return SECOND_STAGES[None], nibbles
    dtype = cpu_nibbles.codes_dtype(codes_residual)
    if dtype not in _SECOND or shape_of(codes_residual) != shape or not codes_residual.is_cpu:
        raise ValueError(
            f"codes_residual must be int16 (E8P) or uint8 (E8) {list(shape)} on the CPU, as codes, got "
            f"{codes_residual.dtype} {list(codes_residual.shape)} on {codes_residual.device}"
        )
    return _SECOND[dtype], nibbles + cpu_nibbles.SECOND * cpu_nibbles.is_nibbles(codes_residual)


def rows_of(x: torch.Tensor, size: int) -> torch.Tensor:
    """x as [vectors, size] with neighbours in memory along the last dimension; copied only if necessary."""
    rows = x.reshape(-1, size) if x.numel() else x.new_empty(0, size)
    return rows if rows.stride(1) == 1 or size == 1 else rows.contiguous()


def vector_type(vector: torch.Tensor | None, size: int, name: str) -> int:
    if vector is None:
        return 0
    if vector.shape != (size,):
        raise ValueError(f"{name} has shape {list(vector.shape)}, expected [{size}]")
    return type_of(vector, name)


def type_of(tensor: torch.Tensor, name: str) -> int:
    kind = DTYPES.get(tensor.dtype)
    if kind is None or not tensor.is_cpu:
        raise ValueError(f"{name} must be float32, bfloat16 or float16 on the CPU, got {tensor.dtype} on {tensor.device}")
    return kind


def _signs(factor: torch.Tensor) -> torch.Tensor | None:
    """Of a matrix whose entries have one magnitude, the address of each four in a row: uint16 [order, order/4].

    The sixteen sums ± a ± b ± c ± d of four entries of two neighbouring columns are 128 bytes each, one after the other.
    None for another matrix, and for one whose sums would have addresses of more than 16 bits.
    """
    order = factor.shape[0]
    if order % 4 or not _LEAST_SIGNS <= order <= _MOST_SIGNS:
        return None
    if not torch.allclose(factor.abs(), factor[0, 0].abs(), rtol=1e-6, atol=0):
        return None
    sums = ((factor < 0).reshape(order, -1, 4).int() * torch.tensor([1, 2, 4, 8], dtype=torch.int32)).sum(-1)
    return ((16 * torch.arange(order // 4) + sums) * 128).to(torch.uint16)


def _is_sylvester(factor: torch.Tensor) -> bool:
    """Whether the matrix is Sylvester's of its order, divided by the root of the order."""
    order = factor.shape[0]
    if order & (order - 1):
        return False
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < order:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return torch.allclose(factor.double() * math.sqrt(order), matrix, rtol=0, atol=1e-6)
