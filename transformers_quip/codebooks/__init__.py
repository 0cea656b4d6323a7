"""Codebooks: which values the weights of a block may take, and the codes that name them.

A new codebook is a [`Codebook`] subclass in a file of its own, registered here.
"""

from __future__ import annotations

import functools

from ..registry import Registry
from .base import Codebook, Grid
from .d4 import D4
from .e8p import E8P
from .half_integer import HalfInteger
from .residual import ResidualE8P
from .scalar import Scalar
from .trellis import Trellis

__all__ = ["Codebook", "Grid", "default_for_bits", "get", "is_read_only", "names"]

_CODEBOOKS: Registry[Codebook] = Registry("codebook")
for _codebook in (
    E8P(),
    ResidualE8P("e8p-rvq3"),
    ResidualE8P("e8p-rvq4"),
    D4(),
    HalfInteger(),
    *(Scalar(bits) for bits in (2, 3, 4, 8)),
):
    _CODEBOOKS.register(_codebook.name, _codebook)

_DEFAULTS = {2: "e8p", 3: "e8p-rvq3", 4: "e8p-rvq4", 8: "scalar8"}


def names() -> tuple[str, ...]:
    """The codebooks that a config can name."""
    return _CODEBOOKS.names()


def get(name: str, residual_scale: float | None = None) -> Codebook:
    """The codebook of this name.

    Args:
        name: one of [`names`], or "trellis:…" (see `trellis.py`): those are only read, and not listed.
        residual_scale: what multiplies its second stage; None: its own (`Codebook.residual_scale`).

    Raises:
        ValueError: the name is unknown; a residual scale is not finite, zero, or given for a codebook of one stage.
    """
    book = _trellis(name) if isinstance(name, str) and name.startswith("trellis:") else _CODEBOOKS[name]
    return book if residual_scale is None else _with_residual_scale(book, residual_scale)


_trellis = functools.lru_cache(maxsize=256)(Trellis.parse)


@functools.lru_cache(maxsize=64)
def _with_residual_scale(book: Codebook, scale: float) -> Codebook:
    return book.with_residual_scale(scale)


def is_read_only(name: object) -> bool:
    """Whether this names a codebook that is only for checkpoints made elsewhere; [`names`] lists none of them."""
    if not isinstance(name, str):
        return False
    try:
        return get(name).is_read_only
    except ValueError:
        return False


def default_for_bits(bits: float) -> str:
    """The codebook that `bits` alone chooses. Raises `ValueError` where there is none."""
    if bits not in _DEFAULTS:
        raise ValueError(f"bits={bits} has no codebook, choose one of {', '.join(map(str, _DEFAULTS))}")
    return _DEFAULTS[bits]
