"""The ops of `torch.ops.quip`: their signatures, and the shape and type of their results without computing them."""

from __future__ import annotations

import torch

from .triton import run as triton

SCHEMAS = {
    # Q x along the last dimension (Qᵀ x if transpose); Q = incoherence.get(incoherence, x.shape[-1], seed).
    "transform": "(Tensor x, str incoherence, int seed, bool transpose) -> Tensor",
    # The weight Ŵ [m, columns] that codes stand for; residual_scale: of the second stage, None: the codebook's own;
    # table: of a codebook that has one.
    "decode": (
        "(Tensor codes, Tensor? codes_residual, str codebook, int columns, ScalarType dtype, "
        "float? residual_scale=None, Tensor? table=None) -> Tensor"
    ),
    # sv ⊙ Q_out(Ŵ Q_inᵀ(su ⊙ x)) + bias for x [..., n]: [..., m] in the dtype of x.
    "linear": (
        "(Tensor x, Tensor codes, Tensor? codes_residual, Tensor su, Tensor sv, Tensor? bias, str codebook, "
        "str incoherence_in, str incoherence_out, int seed, float? residual_scale=None, "
        "Tensor? table=None) -> Tensor"
    ),
    # linear in two steps, so that linears of one input and equal su do the first once. Q_inᵀ(su ⊙ x) in the form that the
    # second step of this device takes, with activations ("exact", "int8") as they were when it was made.
    "rotate": "(Tensor x, Tensor su, str codebook, str incoherence, int seed, str activations) -> Tensor[]",
    # The rest of linear for the x that was rotated.
    "rotated_linear": (
        "(Tensor x, Tensor[] rotated, Tensor codes, Tensor? codes_residual, Tensor sv, Tensor? bias, str codebook, "
        "str incoherence, int seed, float? residual_scale=None, Tensor? table=None) -> Tensor"
    ),
}


def transform(x: torch.Tensor, incoherence: str, seed: int, transpose: bool) -> torch.Tensor:
    """Fake of quip::transform."""
    return x.new_empty(x.shape)


def decode(
    codes: torch.Tensor,
    codes_residual: torch.Tensor | None,
    codebook: str,
    columns: int,
    dtype: torch.dtype,
    residual_scale: float | None = None,
    table: torch.Tensor | None = None,
) -> torch.Tensor:
    """Fake of quip::decode."""
    # [m, c] in the logical layout, [2, m, words] in that of the kernels
    return codes.new_empty((codes.shape[-2], columns), dtype=dtype)


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
    """Fake of quip::linear."""
    return x.new_empty((*x.shape[:-1], sv.shape[0]))


def rotate(
    x: torch.Tensor, su: torch.Tensor, codebook: str, incoherence: str, seed: int, activations: str
) -> list[torch.Tensor]:
    """Fake of quip::rotate."""
    return [x.new_empty(shape, dtype=dtype) for shape, dtype in triton.rotated_form(x, codebook, activations)]


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
    """Fake of quip::rotated_linear."""
    return x.new_empty((*x.shape[:-1], sv.shape[0]))


def define() -> None:
    """Define every op and its fake."""
    for name, schema in SCHEMAS.items():
        torch.library.define(f"quip::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))
    for fake in (transform, decode, linear, rotate, rotated_linear):
        torch.library.register_fake(f"quip::{fake.__name__}", fake)
