"""The ops in plain PyTorch: slow, readable, on every device, and the truth that faster versions are tested against."""

from __future__ import annotations

import torch

from .. import codebooks
from .. import incoherence as transforms
from ..codebooks.trellis import Trellis
from . import packing


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the ops compute for an input of this one: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def transform(x: torch.Tensor, incoherence: str, seed: int, transpose: bool) -> torch.Tensor:
    """Multiply every vector along the last dimension by the incoherence transform of its size.

    Args:
        x: floating point [..., n].
        incoherence: name of the transform.
        seed: of its random part.
        transpose: multiply by Qᵀ, the inverse, instead of Q.

    Returns:
        [..., n] in the dtype of x, computed in [`compute_dtype`].
    """
    if x.numel() == 0:
        return torch.zeros_like(x, memory_format=torch.contiguous_format)
    q = transforms.get(incoherence, x.shape[-1], seed)
    y = x.to(compute_dtype(x.dtype)).contiguous()
    y = (q.apply_transpose(y) if transpose else q.apply(y)).to(x.dtype)
    # An op may not return its input, which the identity transform does.
    return y.clone() if y.data_ptr() == x.data_ptr() else y.contiguous()


def decode(
    codes: torch.Tensor,
    codes_residual: torch.Tensor | None,
    codebook: str,
    columns: int,
    dtype: torch.dtype,
    residual_scale: float | None = None,
    table: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weight that stored codes stand for.

    Args:
        codes: integers of m rows, as the codebook's `layout` describes them.
        codes_residual: codes of a second stage; None for a codebook of one stage.
        codebook: its name.
        columns: the real columns; what completes the last block is dropped.
        dtype: of the result.
        residual_scale: what multiplies the second stage; None: the codebook's own.
        table: floating point, of the codebook's `table_shape`; None for a codebook without one.

    Returns:
        Ŵ [m, columns].
    """
    codes, codes_residual = packing.logical(codes, codes_residual, codebook, columns)
    check_codes(codes, codes_residual, codebook, columns, table)
    book = codebooks.get(codebook, residual_scale)
    if isinstance(book, Trellis):
        return book.decode(codes, columns, dtype, table=table)
    return book.decode(codes, columns, dtype, codes_residual).contiguous()


def check_codes(
    codes: torch.Tensor,
    codes_residual: torch.Tensor | None,
    codebook: str,
    columns: int,
    table: torch.Tensor | None = None,
) -> None:
    """Raise `ValueError` for codes that are not those of `columns` columns in this codebook, or for another table."""
    book = codebooks.get(codebook)
    given = None if table is None else tuple(table.shape)
    if given != book.table_shape:
        needed = "no table" if book.table_shape is None else f"a table {list(book.table_shape)}"
        raise ValueError(f"codebook {codebook!r} takes {needed}, got {'none' if given is None else list(given)}")
    grids = book.layout(codes.shape[0], columns)
    if (codes_residual is not None) != (len(grids) > 1):
        stages = "two stages and needs" if len(grids) > 1 else "one stage and takes no"
        raise ValueError(f"codebook {codebook!r} has {stages} codes_residual")
    given = {"codes": codes, "codes_residual": codes_residual}
    for (name, tensor), grid in zip(given.items(), grids, strict=False):
        if tensor.dtype != grid.dtype or tensor.shape != grid.shape:
            raise ValueError(
                f"{name} for {columns} columns of codebook {codebook!r} are {grid.dtype} {list(grid.shape)}, got "
                f"{tensor.dtype} {list(tensor.shape)}"
            )


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
    """y = sv ⊙ Q_out( Ŵ · Q_inᵀ( su ⊙ x ) ) + bias (QuIP#, arXiv 2402.04396, algorithm 2).

    Args:
        x: floating point [..., n].
        codes, codes_residual, codebook, residual_scale, table: see [`decode`].
        su: [n]; sv: [m]; bias: [m] or None. Any floating dtype.
        incoherence_in, incoherence_out, seed: name the transforms Q_in [n, n] and Q_out [m, m].

    Returns:
        [..., m] in the dtype of x, computed in [`compute_dtype`].
    """
    rotated = rotate(x, su, codebook, incoherence_in, seed, "exact")
    return rotated_linear(
        x, rotated, codes, codes_residual, sv, bias, codebook, incoherence_out, seed, residual_scale, table
    )


def rotate(
    x: torch.Tensor, su: torch.Tensor, codebook: str, incoherence: str, seed: int, activations: str
) -> list[torch.Tensor]:
    """The first step of [`linear`]: [Q_inᵀ( su ⊙ x )], one tensor [..., n] in [`compute_dtype`]."""
    dtype = compute_dtype(x.dtype)
    return [transform(x.to(dtype) * su.to(dtype), incoherence, seed, True)]


def rotated_linear(
    x: torch.Tensor,
    rotated: list[torch.Tensor],
    codes: torch.Tensor,
    codes_residual: torch.Tensor | None,
    sv: torch.Tensor,
    bias: torch.Tensor | None,
    codebook: str,
    incoherence: str,
    seed: int,
    residual_scale: float | None = None,
    table: torch.Tensor | None = None,
) -> torch.Tensor:
    """The second step of [`linear`], from what [`rotate`] made of x; x itself tells the shape and the dtype."""
    dtype = compute_dtype(x.dtype)
    weight = decode(codes, codes_residual, codebook, x.shape[-1], dtype, residual_scale, table)
    y = torch.nn.functional.linear(rotated[0], weight)
    y = transform(y, incoherence, seed, False) * sv.to(dtype)
    if bias is not None:
        y = y + bias.to(dtype)
    return y.to(x.dtype)


def register() -> None:
    """Make these the implementation on every device that has none of its own."""
    for function in (transform, decode, linear, rotate, rotated_linear):
        torch.library.impl(f"quip::{function.__name__}", "default", function)
