"""E8P layers of many bfloat16 vectors on a processor with AMX, in three steps: into bundles, products, out of bundles.

A bundle is sixteen vectors side by side, so that a transform works on all of them at once. Each thread decodes a few rows
of the weight, multiplies all bundles by them while they are in its cache, and forgets them. Products are those of bfloat16
entries, summed in float32, as a dense layer's are; what is between them and the result is float32.
"""

from __future__ import annotations

import ctypes
import functools

import torch

from .cpu_library import LEVELS, BundleCall, default_level, library
from .cpu_linear import SECOND, Transform, vector_type

BUNDLE = 16
WHOLE = 32  # sizes of layers are multiples of this
_MARGIN = 32  # numbers between decoded rows, fixed in the C source
_MOST_DECODED = 1 << 19  # weights that a thread has decoded at a time: half of a cache
_PIECES = 8  # that each thread takes its share in, at least where there are so many rows


@functools.cache
def is_available() -> bool:
    """Whether the library was built with these kernels, this processor has what they need, and nobody asked for less."""
    found = library()
    if found is None or LEVELS[default_level()] != "avx512" or not hasattr(found, "quip_bundle_products"):
        return False
    pointer, size, number, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
    weight = [pointer, pointer, number, real, size, size]
    for name, arguments in (
        ("quip_to_bundles", [pointer]),
        ("quip_from_bundles", [pointer]),
        ("quip_bundle_products", [*weight, pointer, size, pointer, pointer, size, number]),
    ):
        function = getattr(found, name)
        function.restype, function.argtypes = None, arguments
    return bool(found.quip_has_amx())


def bundles_of(vectors: int) -> int:
    """Bundles for so many vectors: an even number."""
    return -(-vectors // (2 * BUNDLE)) * 2


def workspace(m: int, n: int) -> int:
    """Numbers of float32 that the three steps of a layer need as `memory`, with PyTorch's present number of threads."""
    threads, most = torch.get_num_threads(), max(m, n)
    decoded = threads * _rows(m, n) * (n + _MARGIN) // 2
    return max((2 * threads * BUNDLE + 2) * most, decoded)


def to_bundles(
    x: torch.Tensor, q: Transform | None, before: torch.Tensor | None, out: torch.Tensor, memory: torch.Tensor
) -> torch.Tensor:
    """Qᵀ( before ⊙ x ), rounded to bfloat16.

    Args:
        x: bfloat16 [N, n], n a multiple of 32, neighbours along a vector next to each other in memory.
        q: of size n; None for the identity. before: [n] or None.
        out: int32 [bundles, n/2, 16], `bundles_of(N)` of them: each word is two neighbouring entries of a vector.
        memory: float32 [`workspace`] to work with.

    Returns:
        out.

    Raises:
        ValueError: a tensor is not as described.
    """
    count, n = x.shape
    _check(x, "x", torch.bfloat16, (count, n), contiguous=False)
    _check(out, "out", torch.int32, (bundles_of(count), n // 2, BUNDLE))
    library().quip_to_bundles(_call(x.data_ptr(), out.data_ptr(), q, before, None, n, count, x.stride(0), memory))
    return out


def products(
    x: torch.Tensor,
    codes: torch.Tensor,
    out: torch.Tensor,
    memory: torch.Tensor,
    codes_residual: torch.Tensor | None = None,
    residual_scale: float = 1.0,
) -> torch.Tensor:
    """Ŵ x of E8P codes for every vector.

    Args:
        x: as [`to_bundles`] gives it, of contiguous memory.
        codes: int16 [m, n/8], m a multiple of 32. codes_residual, residual_scale: see `cpu_linear.linear`.
        out: float32 [bundles, m, 16].
        memory: see [`to_bundles`].

    Returns:
        out.

    Raises:
        ValueError: a tensor is not as described.
    """
    bundles, n, m = x.shape[0], 2 * x.shape[1], codes.shape[0]
    _check(x, "x", torch.int32, (bundles, n // 2, BUNDLE))
    _check(codes, "codes", torch.int16, (m, n // 8))
    _check(out, "out", torch.float32, (bundles, m, BUNDLE))
    if m % WHOLE or n % WHOLE or bundles % 2:
        raise ValueError(f"{m} rows and {n} columns must be multiples of {WHOLE}, and {bundles} bundles an even number")
    if codes_residual is not None:
        if codes_residual.dtype not in SECOND:
            raise ValueError(f"codes_residual must be int16 (E8P) or uint8 (E8), got {codes_residual.dtype}")
        _check(codes_residual, "codes_residual", codes_residual.dtype, codes.shape)
    _check_memory(memory, m, n)
    library().quip_bundle_products(
        codes.data_ptr(),
        None if codes_residual is None else codes_residual.data_ptr(),
        0 if codes_residual is None else SECOND[codes_residual.dtype],
        residual_scale,
        m,
        n,
        x.data_ptr(),
        bundles,
        out.data_ptr(),
        memory.data_ptr(),
        _rows(m, n),
        torch.get_num_threads(),
    )
    return out


def from_bundles(
    z: torch.Tensor,
    q: Transform | None,
    after: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    memory: torch.Tensor,
) -> torch.Tensor:
    """after ⊙ Q z + bias, rounded to bfloat16; z is overwritten.

    Args:
        z: as [`products`] gives it.
        q: of size m; None for the identity. after, bias: [m] or None.
        out: bfloat16 [N, m], neighbours along a vector next to each other in memory.
        memory: see [`to_bundles`].

    Returns:
        out.

    Raises:
        ValueError: a tensor is not as described.
    """
    count, m = out.shape
    _check(z, "z", torch.float32, (bundles_of(count), m, BUNDLE))
    _check(out, "out", torch.bfloat16, (count, m), contiguous=False)
    library().quip_from_bundles(_call(z.data_ptr(), out.data_ptr(), q, after, bias, m, count, out.stride(0), memory))
    return out


def _call(
    start: int,
    to: int,
    q: Transform | None,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    size: int,
    count: int,
    stride: int,
    memory: torch.Tensor,
) -> object:
    if size % WHOLE:
        raise ValueError(f"vectors have {size} numbers, which must be a multiple of {WHOLE}")
    if q is not None and q.size != size:
        raise ValueError(f"a transform of size {q.size} was given for {size} features")
    _check_memory(memory, size, 0)
    types = [vector_type(v, size, name) for v, name in ((scale, "the scale"), (bias, "bias"))]
    pointers = [None if v is None else v.data_ptr() for v in (scale, bias)]
    if any(v is not None and not v.is_contiguous() for v in (scale, bias)):
        raise ValueError("the scale and the bias must be contiguous")
    pointers += [None if q is None else q.address, memory.data_ptr()]
    return ctypes.byref(BundleCall(start, to, *pointers, size, count, stride, *types, torch.get_num_threads()))


def _rows(m: int, n: int) -> int:
    """Rows that a thread decodes at a time: whole tiles, in pieces that all threads have about equally many of."""
    most = min(_MOST_DECODED // n, m // (_PIECES * torch.get_num_threads()))
    return max(1, most // WHOLE) * WHOLE


def _check(v: torch.Tensor, name: str, dtype: torch.dtype, shape: tuple[int, ...], contiguous: bool = True) -> None:
    fits = v.is_contiguous() if contiguous else v.stride(1) == 1 or v.shape[1] == 1
    if v.dtype != dtype or v.shape != shape or not v.is_cpu or not fits:
        raise ValueError(f"{name} must be a contiguous {dtype} {list(shape)} on the CPU, got {v.dtype} {list(v.shape)}")


def _check_memory(memory: torch.Tensor, m: int, n: int) -> None:
    needed = workspace(m, max(n, 1))
    if memory.dtype != torch.float32 or memory.numel() < needed or not memory.is_contiguous() or not memory.is_cpu:
        raise ValueError(f"memory must be float32 [{needed}] on the CPU, got {memory.dtype} {list(memory.shape)}")
