"""The share of a quantized linear that one of several processes holds and computes (tensor parallelism).

y = sv ⊙ Q_out( Ŵ · Q_inᵀ( su ⊙ x ) ) can be cut in two ways. Both keep the division of dense layers that Transformers and
vLLM have: the first linears of a block are divided by outputs, the last ones by inputs.

- By *blocks*, without more traffic, where the transform on the divided side has blocks that do not cross the cut. A share
  is a quantized linear by itself, with some of the rows of Ŵ and of sv, or some of the columns of Ŵ and of su. Sums over
  processes may pass through Q_out and sv, which are linear.
- By *rows*, for any transform: each process multiplies some of the rows of Ŵ, and the transform of the outputs needs the
  results of all. Divided by outputs: z = Ŵ_own t, all-gather z, Q_out, sv, and this process's outputs of the result.
  Divided by inputs: all-gather x, z = Ŵ_own t, 0 in the other rows, Q_out, sv, and the sum over processes.

A linear that allows neither is held *whole* by every process, which saves no memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

import torch

from .. import codebooks
from ..incoherence import blocks_of
from ..ops.bundle import Form


class Scheme(Enum):
    """How a linear is divided; see the file's description."""

    WHOLE = "every process holds all of it"
    ROWS = "rows of the weight; the transform of the outputs needs the results of all processes"
    BLOCKS = "blocks of the transforms; the share is a linear by itself"


class Share(NamedTuple):
    """What one process holds of a linear of m outputs and n inputs.

    Attributes:
        scheme: how the linear is divided.
        m, n: of all of it.
        rows, columns: of Ŵ that the process holds, as (begin, end).
        su, sv: the numbers of these vectors that it holds.
        whole: the names of all of it.
        form: the names of the product that the process computes by itself; for ROWS without the output's transform.
    """

    scheme: Scheme
    m: int
    n: int
    rows: tuple[int, int]
    columns: tuple[int, int]
    su: tuple[int, int]
    sv: tuple[int, int]
    whole: Form
    form: Form

    @property
    def book(self) -> codebooks.Codebook:
        """The codebook itself."""
        return codebooks.get(self.form.codebook)

    @property
    def grids(self) -> dict[str, codebooks.Grid]:
        """The stored tensors of the rows and columns that the process holds."""
        sizes = (end - begin for begin, end in (self.rows, self.columns))
        return self.book.tensors(*sizes)

    def cut(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The process's part of a stored tensor, of su or of sv; a view if possible."""
        if name in ("su", "sv"):
            return tensor[slice(*(self.su if name == "su" else self.sv))]
        if self.rows == (0, self.m) and self.columns == (0, self.n):
            return tensor
        return self.book.cut(name, tensor, self.m, self.n, slice(*self.rows), slice(*self.columns))


def of_outputs(form: Form, m: int, n: int, rank: int, count: int, own: Sequence[tuple[int, int]]) -> Share:
    """The share of a linear that is divided by outputs.

    Args:
        form: the linear's names. m, n: its outputs and inputs.
        rank, count: of the processes.
        own: the outputs that this process needs, as (begin, end), in their order.
    """
    book, block = codebooks.get(form.codebook), _block(form.incoherence_out, m)
    if count > 1 and len(own) == 1 and block and _can_be_cut(book, m, n):
        begin, end = own[0]
        if not (begin % block or end % block or begin % book.rows_together or end % book.rows_together):
            local = form._replace(incoherence_out=_name(form.incoherence_out, block))
            return Share(Scheme.BLOCKS, m, n, own[0], (0, n), (0, n), own[0], form, local)
    return of_rows(form, m, n, rank, count)


def of_inputs(form: Form, m: int, n: int, rank: int, count: int) -> Share:
    """The share of a linear that is divided by inputs, of which this process has those from rank·n/count on.

    Args: see [`of_outputs`].
    """
    book, block, width = codebooks.get(form.codebook), _block(form.incoherence_in, n), n // count
    is_even = count > 1 and n % count == 0 and _can_be_cut(book, m, n)
    if is_even and block and not (width % block or width % book.columns_together):
        own = (rank * width, (rank + 1) * width)
        local = form._replace(incoherence_in=_name(form.incoherence_in, block))
        return Share(Scheme.BLOCKS, m, n, (0, m), own, own, (0, m), form, local)
    return of_rows(form, m, n, rank, count)


def of_rows(form: Form, m: int, n: int, rank: int, count: int) -> Share:
    """The share of a linear of which every process multiplies some rows; all of it where they cannot be divided.

    Args: see [`of_outputs`].
    """
    book, height = codebooks.get(form.codebook), m // count
    if count == 1 or m % count or height % book.rows_together or not _can_be_cut(book, m, n):
        return Share(Scheme.WHOLE, m, n, (0, m), (0, n), (0, n), (0, m), form, form)
    own = (rank * height, (rank + 1) * height)
    return Share(Scheme.ROWS, m, n, own, (0, n), (0, n), (0, m), form, form._replace(incoherence_out="none"))


def _block(name: str, size: int) -> int | None:
    """The numbers that a transform mixes with one another; None: all."""
    return 1 if name == "none" else blocks_of(name, size)


def _name(name: str, block: int) -> str:
    """The name under which a part of whole blocks has the transform."""
    return "none" if block == 1 else f"hadamard-{block}"


def _can_be_cut(book: codebooks.Codebook, m: int, n: int) -> bool:
    """Whether the codebook's tensors have known sizes."""
    return not any(None in grid.shape for grid in book.tensors(m, n).values())


def scales_of(share: Share, sv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """sv of a linear that is divided by ROWS, as a number for all rows and the rest.

    The number is the root mean square of sv. The process multiplies its rows by it before it sends them, so that numbers
    between the product and the transform are about as large as outputs, and fit into their type.

    Returns:
        The number once for each row of the share, and sv [m] divided by it, both in float32.
    """
    level = sv.float().square().mean().sqrt()
    level = torch.where(level > 0, level, 1.0)
    return level.expand(share.rows[1] - share.rows[0]).contiguous(), sv.float() / level


def outputs_of(z: torch.Tensor, share: Share, sv: torch.Tensor) -> torch.Tensor:
    """All outputs of a linear that is divided by ROWS, from the products with all of its rows.

    Args:
        z: [..., m], multiplied by the number of [`scales_of`].
        share: of any process.
        sv: the rest, float32 [m].

    Returns:
        [..., m] in the dtype of z.
    """
    y = torch.ops.quip.transform(z, share.whole.incoherence_out, share.whole.seed, False)
    return (y * sv).to(z.dtype)
