"""Codebooks: which values the weights of a block may take, and the codes that name them.

A new codebook is a [`Codebook`] subclass in a file of its own, registered here; [`register`] adds one from outside.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from ..registry import Registry
from .base import RESERVED, Codebook, Grid
from .d4 import D4
from .e8p import E8P
from .half_integer import HalfInteger
from .residual import ResidualE8P
from .scalar import Scalar
from .trellis import BEST, Trellis
from .trellis_rows import PREFIX, TrellisRows

__all__ = [
    "Codebook",
    "Grid",
    "bits_of",
    "default_for_bits",
    "defaults",
    "families",
    "get",
    "is_known",
    "names",
    "register",
    "spec",
]

_CODEBOOKS: Registry[Callable[[], Codebook]] = Registry("codebook")
_DEFAULTS: dict[float, str] = {2: "e8p", 3: "e8p-rvq3", 4: "e8p-rvq4", 8: "scalar8"}
# Codebooks that a config calls by one name, whatever their bits. A saved config may have only that name for a module: what
# it means must never change.
_FAMILIES: dict[str, dict[float, str]] = {"trellis": BEST}


def register(name: str, codebook: Codebook | Callable[[], Codebook]) -> None:
    """Add a codebook, so that a config can name it: weights are quantized with it, saved, loaded and run.

    A model that was saved with it is loaded only where the same name was registered before.

    Args:
        name: as `QuipConfig(codebook=name)` will have it; the codebook's own `name` must be the same.
        codebook: the codebook, or a function without arguments that makes it when it is first needed.

    Raises:
        ValueError: the name is taken or has one of the characters ":" and "@"; the codebook has another name, or stores
            tensors under reserved names (see [`Codebook.tensors`]). A codebook from a function is checked when it is made.

    Example: weights of one bit, which are −1 or 1; eight of them are a byte.

        class Signs(Codebook):
            name, bits, block_size, code_dtype = "signs", 1.0, 8, torch.uint8
            gaussian_scale = 1.2533  # of a unit Gaussian, E|x| = √(2/π) is the best magnitude

            def encode(self, x):
                rows = self.check_vectors(x)
                positive = (rows >= 0).to(torch.int32)
                codes = (positive << torch.arange(8, device=x.device)).sum(-1).to(torch.uint8)
                return codes.reshape(x.shape[:-1]), (2.0 * positive - 1).reshape(x.shape)

            def decode(self, tensors, columns, dtype=torch.float32):
                codes = tensors["codes"]
                bits = (codes[..., None] >> torch.arange(8, device=codes.device)) & 1
                return (2 * bits.to(dtype) - 1).flatten(1)[:, :columns]

        codebooks.register("signs", Signs())
        QuipConfig(codebook="signs")
    """
    if not isinstance(name, str) or not name or set(":@") & set(name):
        raise ValueError(f"a codebook cannot be called {name!r}: a name is text without ':' and '@'")
    if isinstance(codebook, Codebook):
        _check(name, codebook)
        _CODEBOOKS.register(name, lambda: codebook)
    else:
        _CODEBOOKS.register(name, functools.cache(lambda: _check(name, codebook())))


def _check(name: str, codebook: Codebook) -> Codebook:
    if codebook.name != name:
        raise ValueError(f"the codebook that was registered as {name!r} is called {codebook.name!r}")
    stored = list(codebook.tensors(256, 256))
    wrong = [key for key in stored if not key.isidentifier() or key in RESERVED]
    if stored[:1] != ["codes"] or wrong:
        raise ValueError(
            f"codebook {name!r} stores {stored}: the first tensor must be called 'codes', and none of them "
            f"{', '.join(RESERVED)} or a name with a dot"
        )
    return codebook


for _codebook in (
    E8P(),
    ResidualE8P("e8p-rvq3"),
    ResidualE8P("e8p-rvq4"),
    D4(),
    HalfInteger(),
    *(Scalar(bits) for bits in (2, 3, 4, 8)),
):
    register(_codebook.name, _codebook)


def names() -> tuple[str, ...]:
    """The codebooks that a config can name."""
    return _CODEBOOKS.names()


def spec(name: str, residual_scale: float | None = None) -> str:
    """The name of a codebook with another residual scale, as [`get`] takes it and the ops do.

    Args:
        name: see [`get`].
        residual_scale: factor of its second stage; None: its own (`Codebook.residual_scale`).

    Raises:
        ValueError: see [`get`].
    """
    return name if residual_scale is None else get(f"{name}@{float(residual_scale)!r}").name


def get(name: str) -> Codebook:
    """The codebook of this name, the same one at every call.

    Args:
        name: one of [`names`], also followed by "@" and a residual scale ("e8p-rvq4@0.29"); or "trellis:…" or
            "trellis-rows:…" (see `trellis.py`, `trellis_rows.py`), of which there are too many to list.

    Raises:
        ValueError: the name is unknown; a residual scale is not finite, zero, or given for a codebook of one stage.
    """
    if not isinstance(name, str):
        raise ValueError(_CODEBOOKS.unknown(name))
    return _get(name)


@functools.lru_cache(maxsize=1024)
def _get(name: str) -> Codebook:
    if name.startswith("trellis:"):
        return Trellis.parse(name)
    if name.startswith(PREFIX):
        return TrellisRows.parse(name)
    known, separator, scale = name.partition("@")
    if not separator:
        return _CODEBOOKS[name]()
    try:
        residual_scale = float(scale)
    except ValueError:
        raise ValueError(f"codebook {name!r}: {scale!r} is not a residual scale, which is a number") from None
    return _CODEBOOKS[known]().with_residual_scale(residual_scale)


def is_known(name: object) -> bool:
    """Whether this names a codebook: one of [`names`], or one that [`get`] can make."""
    if not isinstance(name, str):
        return False
    try:
        get(name)
    except ValueError:
        return False
    return True


def families() -> tuple[str, ...]:
    """Names that stand for several codebooks, one for each number of bits: see [`default_for_bits`]."""
    return tuple(_FAMILIES)


def bits_of(family: str | None = None) -> list[float]:
    """The bits that some codebook has, ascending: of this family, or if it is None of those that [`names`] lists."""
    return sorted({get(name).bits for name in names()} if family is None else _FAMILIES[family])


def defaults() -> tuple[str, ...]:
    """The codebooks that bits alone choose."""
    return tuple(_DEFAULTS.values())


def default_for_bits(bits: float, family: str | None = None) -> str:
    """The codebook for `bits`, of this family or by default. Raises `ValueError` if there is none."""
    defaults = _DEFAULTS if family is None else _FAMILIES[family]
    if bits not in defaults:
        raise ValueError(f"bits={bits} has no codebook, choose one of {', '.join(f'{known:g}' for known in defaults)}")
    return defaults[bits]
