"""Products with Kronecker factors: the incoherence transforms on a GPU, fused with the operations before and after them.

A transform Q = F₁ ⊗ … ⊗ S has dense factors F (Hadamard matrices of order K, or random orthogonal ones) and at the end
Sylvester's matrix S of a power of two. The factors act on different axes and may be applied in any order:

    `sylvester_kernel`  blocks of P neighbours as tiles [P/B, B], one small product of signs for either side; P ≤ 4096
    `factor_kernel`     y[b, i, r] = Σ_j F[i, j] x[b, j, r] in chunks, for all other factors, and powers beyond 4096

The first pass multiplies by a vector (su) and by a factor per row while it loads, or adds up the parts of a split product;
the last multiplies by a vector (sv) and adds the bias while it stores. Everything is float32 inside.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .. import e8p
from .dot import dot_signs
from .launch import device_of, family, term_dtype
from .quantize import Digits, lowest_digit, quantize, round_to_integer, scale_of
from .tiles import LARGEST_BLOCK, is_fused, tile, warps


class Plan(NamedTuple):
    """A transform Q, split into factors. Q itself is scale · (factors₁ ⊗ factors₂ ⊗ … ⊗ S_power).

    Attributes:
        size: the order of Q.
        factors: dense matrices [K, K] float32 on the device, of entries ±1 or any, in the order of the product.
        signs: for each factor, whether its entries are ±1.
        power: order of Sylvester's matrix, a power of two; 1 if there is none.
        scale: the rest of the normalisation.
    """

    size: int
    factors: tuple[torch.Tensor, ...]
    signs: tuple[bool, ...]
    power: int
    scale: float


@triton.jit
def _sylvester(ORDER: tl.constexpr, BLOCK: tl.constexpr, dtype: tl.constexpr):
    """Sylvester's matrix of order BLOCK, block after block on the diagonal of a matrix of ORDER."""
    i = tl.arange(0, ORDER)[:, None]
    j = tl.arange(0, ORDER)[None, :]
    common = i & j & (BLOCK - 1)
    common ^= common >> 8
    common ^= common >> 4
    common ^= common >> 2
    common ^= common >> 1
    sign = 1.0 - 2.0 * (common & 1).to(tl.float32)
    return tl.where(i // BLOCK == j // BLOCK, sign, 0.0).to(dtype)


@triton.jit
def _load(x, pre, which, row_scale, row, column, inside, columns, parts, part_stride):
    """x [row, column], parts added up, times pre [column] and row_scale [row]; pre and row_scale may be None.

    which: not None: pre [which[row], column] instead.
    """
    place = row * columns + column
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    for part in range(1, parts):
        value += tl.load(x + part * part_stride + place, mask=inside, other=0.0).to(tl.float32)
    if pre is not None:
        if which is not None:
            pre += tl.load(which + row) * columns
        value *= tl.load(pre + column, mask=inside, other=0.0).to(tl.float32)
    if row_scale is not None:
        value *= tl.load(row_scale + row)
    return value


@triton.jit
def _store(y, post, which, bias, value, row, column, inside, columns):
    """y [row, column] = value · post [column] + bias [column]; either may be None. which: as in `_load`, for post."""
    if post is not None:
        if which is not None:
            post += tl.load(which + row) * columns
        value *= tl.load(post + column, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        value += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * columns + column, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _columns_of_tile(A: tl.constexpr, B: tl.constexpr, P: tl.constexpr, loaded: tl.constexpr):
    """The index in its row of each number of a tile: [A, B] as loaded, [B, A] as `_transform_tile` returns it."""
    a = tl.arange(0, A)
    b = tl.arange(0, B)
    if loaded or P <= B:
        return a[:, None] * B + b[None, :]
    else:
        return a[None, :] * B + b[:, None]


@triton.jit
def _transform_tile(value, A: tl.constexpr, B: tl.constexpr, P: tl.constexpr, TERMS: tl.constexpr, TERM: tl.constexpr):
    """S_P on every P numbers of a tile: on its rows if P ≤ B, else as S_{P/B} ⊗ S_B, and then the tile is transposed."""
    value = dot_signs(value, _sylvester(B, P if P < B else B, TERM), TERMS)
    if P > B:
        value = dot_signs(tl.trans(value), _sylvester(A, P // B, TERM), TERMS)
    return value


@triton.jit
def sylvester_kernel(
    x,
    pre,
    which,
    row_scale,
    post,
    bias,
    y,
    columns,
    parts,
    part_stride,
    scale,
    A: tl.constexpr,
    B: tl.constexpr,
    P: tl.constexpr,
    TERMS: tl.constexpr,
    TERM: tl.constexpr,
):
    """scale · S_P on every P neighbours of the rows of x [M, columns]; A·B numbers of a row a program."""
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * (A * B) + _columns_of_tile(A, B, P, True)
    value = _load(x, pre, which, row_scale, row, column, column < columns, columns, parts, part_stride)
    value = _transform_tile(value, A, B, P, TERMS, TERM) * scale
    column = tl.program_id(0) * (A * B) + _columns_of_tile(A, B, P, False)
    _store(y, post, which, bias, value, row, column, column < columns, columns)


@triton.jit
def sylvester_quantize_kernel(
    x,
    pre,
    digits,
    sums,
    scales,
    words,
    scale,
    A: tl.constexpr,
    B: tl.constexpr,
    DIGITS: tl.constexpr,
    TERMS: tl.constexpr,
    TERM: tl.constexpr,
):
    """The digits of scale · S_n (pre ⊙ x) for x [M, n], n = A·B; a row a program. See `quantize`."""
    row = tl.program_id(0).to(tl.int64)
    place = _columns_of_tile(A, B, A * B, True)
    value = tl.load(x + row * (A * B) + place).to(tl.float32) * tl.load(pre + place).to(tl.float32)
    # [A, B] again: four neighbours go into a word
    value = tl.trans(_transform_tile(value, A, B, A * B, TERMS, TERM)) * scale
    largest = tl.max(tl.max(tl.abs(value), 1), 0)
    poison = tl.sum(tl.sum(value * 0.0, 1), 0)
    step, inverse = scale_of(largest, poison, DIGITS)
    tl.store(scales + row, step)
    rest = round_to_integer(value, inverse)
    shift = (8 * (tl.arange(0, 4)))[None, None, :]
    group = tl.arange(0, A)[:, None] * (B // 4) + tl.arange(0, B // 4)[None, :]
    for d in tl.static_range(DIGITS):
        digit = lowest_digit(rest)
        rest = (rest - digit) >> 8
        tl.store(sums + row * DIGITS + d, tl.sum(tl.sum(digit, 1), 0))
        packed = tl.sum(tl.reshape(digit & 0xFF, [A, B // 4, 4]) << shift, 2)
        tl.store(digits + ((row * DIGITS + d) * 8 + group % 8) * words + group // 8, packed)


@triton.jit
def factor_kernel(
    x,
    pre,
    which,
    row_scale,
    factor,
    post,
    bias,
    y,
    groups,
    before,
    after,
    parts,
    part_stride,
    scale,
    ORDER: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_G: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    TERMS: tl.constexpr,
    TERM: tl.constexpr,
):
    """y[m, b, i, r] = scale · Σ_j factor[i, j] x[m, b, j, r] (factor[j, i] if TRANSPOSE); i, j < ORDER.

    groups = all triples (m, b, r) with b < before and r < after; a program has BLOCK_G of them and BLOCK_I of the i.
    TERMS is 0 unless entries are ±1.
    """
    i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)[None, :]
    group = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)[:, None]
    known = group < groups
    outer = tl.minimum(group, groups - 1) // after
    row = (outer // before).to(tl.int64)
    start = (outer % before) * (ORDER * after) + group % after
    columns = before * ORDER * after
    value = tl.zeros([BLOCK_G, BLOCK_I], tl.float32)
    for first in range(0, ORDER, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        source = _load(
            x,
            pre,
            which,
            row_scale,
            row,
            start + j[None, :] * after,
            known & (j < ORDER)[None, :],
            columns,
            parts,
            part_stride,
        )
        j = j[:, None]
        entry = factor + (j * ORDER + i if TRANSPOSE else i * ORDER + j)
        matrix = tl.load(entry, mask=(i < ORDER) & (j < ORDER), other=0).to(tl.float32)
        if TERMS > 0:
            matrix = matrix.to(TERM)
        value += dot_signs(source, matrix, TERMS)
    _store(y, post, which, bias, value * scale, row, start + i * after, known & (i < ORDER), columns)


def make_plan(size: int, factors: Sequence[torch.Tensor], device: torch.device) -> Plan:
    """The description of a transform F₁ ⊗ F₂ ⊗ … for the kernels.

    Args:
        size: its order.
        factors: orthogonal matrices, none for the identity, float64 [f, f] on the CPU; if all entries have one magnitude it
            is a Hadamard matrix, and Sylvester's matrices at the end are merged.
    """
    rest = [factor for factor in factors if factor.shape[0] > 1]
    power = 1
    while rest and _is_sylvester(rest[-1]):
        power *= rest.pop().shape[0]
    dense, is_sign, scale = [], [], 1 / math.sqrt(power)
    if power > LARGEST_BLOCK:
        rest.append(_sylvester_matrix(power // LARGEST_BLOCK).double() / math.sqrt(power // LARGEST_BLOCK))
        power = LARGEST_BLOCK
        scale = 1 / math.sqrt(power)
    for factor in rest:
        order = factor.shape[0]
        signs = bool(((factor.abs() * math.sqrt(order) - 1).abs() < 1e-6).all())
        is_sign.append(signs)
        dense.append((factor.sign().to(torch.int8) if signs else factor.float()).contiguous().to(device))
        scale /= math.sqrt(order) if signs else 1
    return Plan(size, tuple(dense), tuple(is_sign), power, scale)


def _sylvester_matrix(order: int) -> torch.Tensor:
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < order:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def _is_sylvester(factor: torch.Tensor) -> bool:
    order = factor.shape[0]
    if order & (order - 1):
        return False
    return torch.allclose(factor * math.sqrt(order), _sylvester_matrix(order).to(factor.dtype), atol=1e-6)


def transform(
    x: torch.Tensor,
    plan: Plan,
    transpose: bool,
    dtype: torch.dtype,
    *,
    pre: torch.Tensor | None = None,
    row_scale: torch.Tensor | None = None,
    post: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    which: torch.Tensor | None = None,
) -> torch.Tensor:
    """post ⊙ Q (row_scale · pre ⊙ x) + bias, Qᵀ if transpose, for every row of x.

    Args:
        x: [M, n], or [P, M, n]: the sum over the first dimension is meant; contiguous; float16, bfloat16 or float32.
        plan: of Q [n, n], on the device of x.
        dtype: of the result; inside, everything is float32.
        pre, post, bias: floating point [n] or None. row_scale: float32 [M] or None.
        which: int64 [M]: pre and post are contiguous [K, n], and row i of x takes row which[i] of them; None: they are [n].

    Returns:
        [M, n], contiguous.

    Raises:
        ValueError: x does not have the size of the transform.
    """
    if x.ndim not in (2, 3) or x.shape[-1] != plan.size:
        raise ValueError(f"expected [M, {plan.size}] or [P, M, {plan.size}], got {list(x.shape)}")
    parts, rows = (x.shape[0] if x.ndim == 3 else 1), x.shape[-2]
    terms = 3 if dtype == torch.float32 else 2
    passes = len(plan.factors) + (plan.power > 1 or not plan.factors)
    before = 1
    for index in range(passes):
        last = index == passes - 1
        y = torch.empty(rows, plan.size, dtype=dtype if last else torch.float32, device=x.device)
        scale = plan.scale if last else 1.0
        ends = (post, bias) if last else (None, None)
        with device_of(x):
            if index < len(plan.factors):
                factor = plan.factors[index]
                order = factor.shape[0]
                after = plan.size // (before * order)
                groups = rows * before * after
                block = 32 if order > 16 else 16
                factor_kernel[(triton.cdiv(groups, 64), triton.cdiv(order, block))](
                    x,
                    pre,
                    which,
                    row_scale,
                    factor,
                    *ends,
                    y,
                    groups,
                    before,
                    after,
                    parts,
                    rows * plan.size,
                    scale,
                    ORDER=order,
                    BLOCK_I=block,
                    BLOCK_J=block,
                    BLOCK_G=64,
                    TRANSPOSE=transpose,
                    TERMS=terms if plan.signs[index] else 0,
                    TERM=term_dtype(),
                    num_warps=4,
                )
                before *= order
            else:
                a, b = tile(plan.power)
                sylvester_kernel[(triton.cdiv(plan.size, a * b), rows)](
                    x,
                    pre,
                    which,
                    row_scale,
                    *ends,
                    y,
                    plan.size,
                    parts,
                    rows * plan.size,
                    scale,
                    A=a,
                    B=b,
                    P=plan.power,
                    TERMS=terms,
                    TERM=term_dtype(),
                    num_warps=warps(a * b, family(x.device)),
                )
        x, pre, row_scale, parts = y, None, None, 1
    return x


def transform_quantize(x: torch.Tensor, plan: Plan, pre: torch.Tensor, digits: int) -> Digits:
    """The digits of Qᵀ (pre ⊙ x) for every row of x [M, n]; see [`transform`] and `quantize`."""
    rows, size = x.shape
    if plan.factors or not is_fused(plan.power, family(x.device)):
        return quantize(transform(x, plan, True, torch.float32, pre=pre), digits)
    result = Digits.empty(rows, size, digits, x.device)
    a, b = tile(size)
    with device_of(x):
        # S is symmetric
        sylvester_quantize_kernel[(rows,)](
            x,
            pre,
            *result,
            e8p.words(size),
            plan.scale,
            A=a,
            B=b,
            DIGITS=digits,
            TERMS=3 if x.dtype == torch.float32 else 2,
            TERM=term_dtype(),
            num_warps=warps(size, family(x.device)),
        )
    return result
