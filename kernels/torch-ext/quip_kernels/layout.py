"""Kernel layouts of codes of any form, of one stage or two; the tensors themselves tell which form it is.

codes           kernel layout           weights
int16 [m, c]    int32 [2, m, words]     E8P (`e8p`), the first stage of every layer and the second of 4-bit ones
uint8 [m, c]    int32 [1, m, words]     E8 (`e8`), the second stage of 3-bit layers
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import e8, e8p

_BY_DTYPE = {torch.int16: e8p, torch.uint8: e8}
_BY_PLANES = {2: e8p, 1: e8}


class Stage(NamedTuple):
    """One stage of a weight, as kernels take it: factor · (weights of the planes).

    Attributes:
        planes: int32 [2, m, words] or [1, m, words].
        table: int32 [512] or [256], on their device.
        signed: whether the layout has a plane of signs.
        factor: the factor of the weights.
    """

    planes: torch.Tensor
    table: torch.Tensor
    signed: bool
    factor: float


def pack(codes: torch.Tensor) -> torch.Tensor:
    """The kernel layout of codes: `e8p.pack` or `e8.pack`. Raises `TypeError` for codes of another dtype than theirs."""
    if codes.dtype not in _BY_DTYPE:
        raise TypeError(f"codes with a kernel layout are int16 (E8P) or uint8 (E8), got {codes.dtype}")
    return _BY_DTYPE[codes.dtype].pack(codes)


def unpack(planes: torch.Tensor, columns: int) -> torch.Tensor:
    """The codes of a kernel layout: the inverse of [`pack`]. Raises `ValueError` if it does not have `columns` columns."""
    return _form(planes, columns).unpack(planes, columns)


def stages(
    planes: torch.Tensor, columns: int, residual: torch.Tensor | None = None, residual_scale: float = 1.0
) -> tuple[Stage, ...]:
    """Ŵ = (weights of planes) + residual_scale · (weights of residual), checked and taken apart.

    Args:
        planes: the first stage, `residual` the second or None; kernel layouts of matrices of one shape.
        columns: n.

    Raises:
        ValueError: they are not kernel layouts, or not of one shape.
    """
    result = [Stage(planes, _form(planes, columns).table(planes.device), planes.shape[0] == 2, 1.0)]
    if residual is not None:
        table = _form(residual, columns).table(residual.device)
        if residual.shape[1] != planes.shape[1]:
            raise ValueError(f"stages of {planes.shape[1]} and {residual.shape[1]} rows do not belong to one weight")
        result.append(Stage(residual, table, residual.shape[0] == 2, residual_scale))
    return tuple(result)


def _form(planes: torch.Tensor, columns: int):
    form = _BY_PLANES.get(planes.shape[0] if planes.ndim else 0, e8p)
    form.check(planes, columns)
    return form
