"""All tensors and names of one linear: the arguments that the ops for linears take, in their order."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from .. import codebooks
from ..codebooks import Codebook, Grid

# The same in the ops' signatures.
SCHEMA = (
    "Tensor[] weight, Tensor su, Tensor sv, Tensor? bias, str codebook, str incoherence_in, str incoherence_out, int seed"
)


class Layer(NamedTuple):
    """y = sv ⊙ Q_out( Ŵ · Q_inᵀ( su ⊙ x ) ) + bias for n inputs and m outputs.

    Attributes:
        weight: the tensors that the codebook stores for Ŵ [m, n], in the order of `Codebook.tensors`; or, on a GPU, the
            form that Triton kernels take (see `packing`).
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

    @property
    def vectors(self) -> tuple[torch.Tensor, ...]:
        """su, sv and the bias if there is one."""
        return (self.su, self.sv) if self.bias is None else (self.su, self.sv, self.bias)


def named(weight: Sequence[torch.Tensor], book: Codebook, rows: int, columns: int) -> Mapping[str, torch.Tensor]:
    """The stored tensors of a [rows, columns] weight by name. Raises `ValueError` if they are not those of the codebook."""
    names = list(book.tensors(rows, columns))
    if len(weight) != len(names):
        raise ValueError(f"codebook {book.name!r} stores {', '.join(names)}, got {len(weight)} tensors")
    tensors = dict(zip(names, weight, strict=True))
    book.check(tensors, rows, columns)
    return tensors


def stages(weight: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Codes of the first stage, and of the second if there is one, for a codebook whose `kernels` are "e8p"."""
    return weight[0], weight[1] if len(weight) > 1 else None


def dtypes_fit(weight: Sequence[torch.Tensor], codebook: str) -> bool:
    """Whether these are as many tensors as the codebook stores, of their types; the sizes are not looked at."""
    grids = _grids(codebook)
    return len(weight) == len(grids) and all(
        tensor.is_floating_point() if grid.dtype.is_floating_point else tensor.dtype == grid.dtype
        for tensor, grid in zip(weight, grids, strict=True)
    )


@functools.lru_cache(maxsize=1024)
def _grids(codebook: str) -> tuple[Grid, ...]:
    return tuple(codebooks.get(codebook).tensors(256, 256).values())
