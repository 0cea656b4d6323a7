"""E8P layers of many vectors of 16 bits, on a processor with AMX.

Vectors are rotated sixteen at a time, side by side, in a "bundle" (see bundles.h). Each thread decodes a few rows of the
weight, multiplies all bundles by them while they are in its cache, and drops them. Products are either bfloat16 products
summed in float32, as in a dense layer, or exact products of the weight with int8. All further arithmetic is float32.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from .cpu_library import LEVELS, default_level, library, loaded
from .cpu_linear import DTYPES, Transform, contiguous, layer_of, rows_of

WHOLE = 32  # sizes of layers are multiples of this
_DTYPES = {False: (torch.bfloat16,), True: (torch.bfloat16, torch.float16)}  # of x, by whether it becomes int8
_BUNDLE = 16
_TILE = 16  # words of 32 bits of each row in a tile; fixed in the C source
_MARGIN = 64  # bytes between decoded rows; fixed in the C source
_MOST_DECODED = 1 << 19  # weights that a thread holds decoded at a time: half of a cache
_PIECES = 8  # the least number of pieces of each thread's share, if there are enough rows
_TOGETHER = 512  # vectors whose float32 products exist at a time


def is_available() -> bool:
    """Whether the library has these kernels, the processor can run them, and no lower instruction level was requested."""
    return library() is not None and LEVELS[default_level()] == "avx512" and _has_amx()


@functools.cache
def _has_amx() -> bool:
    return bool(loaded().quip_has_amx())


def takes(dtype: torch.dtype, m: int, n: int, int8: bool) -> bool:
    """Whether [`linear`] takes vectors of this dtype for a layer of n inputs and m outputs."""
    return dtype in _DTYPES[int8] and m % WHOLE == 0 and n % WHOLE == 0 and is_available()


def rotated_shape(vectors: int, n: int, int8: bool = False) -> tuple[int, int, int]:
    """The shape of rotated inputs, int32: each is two neighbouring entries of a vector in bfloat16, or four in int8.

    With int8, zeros complete the entries to whole tiles, and the last row has the scales of the vectors, in float32.
    """
    return _even_bundles(vectors), _words(n, int8) + int8, _BUNDLE


def workspace(vectors: int, m: int, n: int) -> int:
    """Size in float32 numbers of the workspace of [`linear`], with PyTorch's current number of threads."""
    return plan(vectors, m, n, False, torch.get_num_threads()).workspace


class Plan(NamedTuple):
    """The sizes that [`run`] needs: shape of the rotated inputs, float32 numbers, rows decoded at a time."""

    rotated_shape: tuple[int, int, int]
    workspace: int
    sums: int  # of the workspace, at its beginning
    rows: int


@functools.lru_cache(maxsize=1024)
def plan(vectors: int, m: int, n: int, int8: bool, threads: int) -> Plan:
    """See [`Plan`]; cached for every layer size, because making one takes as long as a small layer."""
    sums, rows = _even_bundles(min(vectors, _TOGETHER)) * _BUNDLE * m, _rows(m, n, threads)
    decoded = threads * rows * (n // 2 + _MARGIN // 4)
    workspace = sums + max(decoded, (2 * threads * _BUNDLE + 2) * max(m, n))
    return Plan(rotated_shape(vectors, n, int8), workspace, sums, rows)


def linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    su: torch.Tensor | None,
    sv: torch.Tensor | None,
    bias: torch.Tensor | None,
    transform_in: Transform | None,
    transform_out: Transform | None,
    rotated: torch.Tensor,
    is_rotated: bool,
    memory: torch.Tensor,
    codes_residual: torch.Tensor | None = None,
    residual_scale: float = 1.0,
    int8: bool = False,
) -> torch.Tensor:
    """y = sv ⊙ Q_out( Ŵ · Q_inᵀ( su ⊙ x ) ) + bias; a part that is None is left out.

    The result depends neither on the number of threads nor on the other vectors.

    Args:
        x: bfloat16 [..., n], or float16 if `int8`; n a multiple of 32.
        codes, su, sv, bias, transform_in, transform_out, codes_residual, residual_scale: see `cpu_linear.linear`; m is a
            multiple of 32.
        int8: whether rotated inputs are rounded to int8, each vector with a scale of its own; for codes of one stage.
        rotated: int32 of `rotated_shape`, for Q_inᵀ( su ⊙ x ): read if `is_rotated`, else written here.
        memory: float32 [`workspace`] to work with.

    Returns:
        [..., m] of the dtype of x. A vector with an entry that is not finite gives NaN.

    Raises:
        ValueError: a tensor is not as described, or the processor has no AMX (see `is_available`).
    """
    if not is_available():
        raise ValueError("many vectors at once need the compiled library and a processor with AMX")
    n = x.shape[-1]
    rows = rows_of(x, n)
    tensors = (contiguous(codes), contiguous(codes_residual), contiguous(su), contiguous(sv), contiguous(bias))
    m = codes.shape[0]
    layer, address = layer_of(n, tensors, transform_in, transform_out, residual_scale)
    if x.dtype not in _DTYPES[int8] or not x.is_cpu or m % WHOLE or n % WHOLE:
        raise ValueError(
            f"x must be bfloat16, or float16 with int8, on the CPU, inputs and outputs multiples of {WHOLE}, got {x.dtype} "
            f"on {x.device}, {n} and {m}"
        )
    if int8 and codes_residual is not None:
        raise ValueError("int8 inputs are for codes of one stage, got two stages")
    count, threads = len(rows), torch.get_num_threads()
    planned = plan(count, m, n, int8, threads)
    _check(rotated, "rotated", torch.int32, planned.rotated_shape)
    _check(memory, "memory", torch.float32, (planned.workspace,))
    y = x.new_empty(*x.shape[:-1], m)
    run(address, rows, y, count, rows.stride(0), rotated, is_rotated, int8, memory, planned, threads)
    del layer  # kept alive until here, even if another thread drops it from the cache
    return y


def run(
    address: int,
    x: torch.Tensor,
    y: torch.Tensor,
    count: int,
    stride: int,
    rotated: torch.Tensor,
    is_rotated: bool,
    int8: bool,
    memory: torch.Tensor,
    planned: Plan,
    threads: int,
) -> None:
    """[`linear`] for arguments that have been checked: y of `count` vectors of x which are `stride` apart.

    Args:
        address: of the layer's description (`cpu_linear.layer_of`).
        planned: the plan for this number of vectors and threads.
    """
    start = memory.data_ptr()
    loaded().quip_linear_many(
        address,
        x.data_ptr(),
        y.data_ptr(),
        DTYPES[x.dtype],
        count,
        stride,
        rotated.data_ptr(),
        is_rotated,
        int8,
        start,
        _TOGETHER,
        start + 4 * planned.sums,
        planned.rows,
        threads,
    )


def _even_bundles(vectors: int) -> int:
    return -(-vectors // (2 * _BUNDLE)) * 2


def _words(n: int, int8: bool) -> int:
    return -(-n // (4 * _TILE)) * _TILE if int8 else n // 2


def _rows(m: int, n: int, threads: int) -> int:
    """Rows that a thread decodes at a time: whole tiles, so that all threads get about the same number of pieces."""
    return max(1, min(_MOST_DECODED // n, m // (_PIECES * threads)) // WHOLE) * WHOLE


def _check(v: torch.Tensor, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if v.dtype != dtype or v.shape != shape or not v.is_contiguous() or not v.is_cpu:
        raise ValueError(f"{name} must be contiguous {dtype} {list(shape)} on the CPU, got {v.dtype} {list(v.shape)}")
