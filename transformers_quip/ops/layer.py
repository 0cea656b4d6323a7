"""All tensors and names of one linear: the arguments that the ops for linears take, in their order."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from .. import codebooks
from ..codebooks import Codebook

# The same in the ops' signatures.
SCHEMA = (
    "Tensor[] weight, Tensor su, Tensor sv, Tensor? bias, str codebook, str incoherence_in, str incoherence_out, int seed"
)

# Those of grouped linears: the tensors of the weight, su and sv are stacked, and there is no bias.
GROUPED_SCHEMA = (
    "Tensor ends, Tensor[] weight, Tensor su, Tensor sv, str codebook, str incoherence_in, str incoherence_out, int seed"
)

# Those of linears that read one input: lists of tensors, and the names of all in one text (see `bundle.layers_of`).
BUNDLE_SCHEMA = "Tensor[] weight, Tensor[] su, Tensor[] sv, str linears"


class Layer(NamedTuple):
    """y = sv ⊙ Q_out( Ŵ · Q_inᵀ( su ⊙ x ) ) + bias for n inputs and m outputs.

    Attributes:
        weight: the tensors that the codebook stores for Ŵ [m, n], in the order of `Codebook.tensors`; or another
            form of them (see `packing`).
        su: [n]; sv: [m]; bias: [m] or None. Any floating dtype.
        codebook: its name, as `codebooks.get` takes it.
        incoherence_in, incoherence_out, seed: name the transforms Q_in [n, n] and Q_out [m, m].
    """

    weight: Sequence[torch.Tensor]
    su: torch.Tensor
    sv: torch.Tensor
    bias: torch.Tensor | None
    codebook: str
    incoherence_in: str
    incoherence_out: str
    seed: int

    @property
    def n(self) -> int:
        """Inputs."""
        return self.su.shape[0]

    @property
    def m(self) -> int:
        """Outputs."""
        return self.sv.shape[0]

    @property
    def book(self) -> Codebook:
        """The codebook itself."""
        return codebooks.get(self.codebook)


def named(weight: Sequence[torch.Tensor], book: Codebook, rows: int, columns: int) -> Mapping[str, torch.Tensor]:
    """The stored tensors of a [rows, columns] weight by name. Raises `ValueError` if they do not fit the codebook."""
    grids = _grids(book, rows, columns)
    if len(weight) != len(grids):
        names = ", ".join(name for name, _, _ in grids)
        raise ValueError(f"codebook {book.name!r} stores {names}, got {len(weight)} tensors")
    tensors, fits = {}, True
    for (name, shape, dtype), tensor in zip(grids, weight, strict=True):
        tensors[name] = tensor
        fits = fits and tensor.dtype is dtype and tensor.shape == shape
    if not fits:  # or if a grid leaves a size or the type open
        book.check(tensors, rows, columns)
    return tensors


@functools.lru_cache(maxsize=4096)
def _grids(book: Codebook, rows: int, columns: int) -> tuple[tuple[str, tuple[int | None, ...], torch.dtype], ...]:
    return tuple((name, tuple(grid.shape), grid.dtype) for name, grid in book.tensors(rows, columns).items())


def stages(weight: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Codes of the first stage, and of the second if there is one, for a codebook whose `kernels` are "e8p"."""
    return weight[0], weight[1] if len(weight) > 1 else None


@functools.lru_cache(maxsize=1024)
def integer_dtypes(codebook: str) -> tuple[torch.dtype | None, ...]:
    """For each tensor that a codebook stores, its integer type; None for a floating one."""
    grids = codebooks.get(codebook).tensors(256, 256).values()
    return tuple(None if grid.dtype.is_floating_point else grid.dtype for grid in grids)
