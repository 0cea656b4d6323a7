"""The input and output of every rounding method, and the measure that all of them minimise."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..codebooks import Codebook


@dataclass(frozen=True, eq=False)
class Problem:
    """A weight to round, with everything that a rounding method may use.

    With the errors E = W − Ŵ, the methods make tr(E H Eᵀ) small; two-sided ones tr(E H Eᵀ H_out) ([`proxy_loss`]).

    Attributes:
        weight: float32 [m, n], W after its transforms, in units of the codebook. m and n are multiples of
            `codebook.rows_together` and `codebook.block_size`.
        hessian: float32 [n, n], H = E[x xᵀ] of the inputs after the same transforms, symmetric positive definite; None
            without calibration.
        codebook: the codebook of the points to choose from.
        sweeps: refinement passes over all columns after the first.
        seed: random seed, for stochastic methods.
        hessian_out: float32 [m, m], E[g gᵀ] of the loss's gradients g with respect to the outputs, after the transforms;
            None for the identity. Only two-sided methods read it (YAQA, arXiv 2505.22988).

    Raises:
        ValueError: the weight has incomplete blocks, or a Hessian has another size.
    """

    weight: torch.Tensor
    hessian: torch.Tensor | None
    codebook: Codebook
    sweeps: int = 0
    seed: int = 0
    hessian_out: torch.Tensor | None = None

    def __post_init__(self) -> None:
        rows, columns = self.weight.shape
        book = self.codebook
        if rows % book.rows_together or columns % book.block_size:
            raise ValueError(
                f"codebook {book.name!r} codes {book.rows_together} rows and {book.block_size} columns together, so a "
                f"weight of shape [{rows}, {columns}] has incomplete blocks: complete it before it is rounded"
            )
        for hessian, size in ((self.hessian, columns), (self.hessian_out, rows)):
            if hessian is not None and tuple(hessian.shape) != (size, size):
                raise ValueError(f"a weight of shape [{rows}, {columns}] cannot have a Hessian of {list(hessian.shape)}")

    @property
    def required_hessian(self) -> torch.Tensor:
        """`hessian`, for a method that needs it. Raises `ValueError` if it is None."""
        if self.hessian is None:
            raise ValueError("this rounding method needs the Hessian of the inputs, but the problem has none")
        return self.hessian


class Rounded(NamedTuple):
    """A weight matrix on the points of a codebook.

    Attributes:
        codes: of the codebook's `code_dtype`, [m / rows_together, n / block_size], and the dimensions of one code.
        points: float32 [m, n], the points that the codes name.
    """

    codes: torch.Tensor
    points: torch.Tensor


class Rounding(abc.ABC):
    """Chooses the codes of a weight matrix.

    Attributes:
        name: as in the config.
        needs_hessian: whether the method is useful only with a Hessian.
        scalar_only: whether it is defined for grids of single weights alone (codebooks of block size 1, whose values are
            one unit apart).
        rows_independent: whether a row (of a codebook that codes several rows together: each such group of rows) is
            rounded independently of the others. Then weights that read the same input are rounded as one stack of rows,
            and large ones in chunks of rows; else each weight is a problem of its own.
        two_sided: whether it reads `Problem.hessian_out`.
    """

    name: str
    needs_hessian: bool
    scalar_only: bool = False
    rows_independent: bool = True
    two_sided: bool = False

    def works_with(self, codebook: Codebook) -> bool:
        """Whether the method is defined for this codebook."""
        return codebook.block_size == 1 or not self.scalar_only

    @abc.abstractmethod
    def round(self, problem: Problem) -> Rounded:
        """Round a weight.

        Raises:
            ValueError: the method needs a Hessian, and the problem has none.
            torch.linalg.LinAlgError: a factorisation that the method needs does not exist.
        """


def proxy_loss(error: torch.Tensor, hessian: torch.Tensor, hessian_out: torch.Tensor | None = None) -> torch.Tensor:
    """tr(E H Eᵀ), the error of a linear layer's output over the calibration tokens (QuIP, arXiv 2307.13304, eq. 1).

    With an output-side Hessian tr(E H Eᵀ H_out), the second-order change of the model's loss (YAQA, arXiv 2505.22988):
    the Hessian of the loss with respect to the weight is approximated by the Kronecker product of both.

    Args:
        error: [m, n], W − Ŵ.
        hessian: [n, n] = E[x xᵀ].
        hessian_out: [m, m]; None: the identity.

    Returns:
        float64 scalar tensor.
    """
    moved = error @ hessian
    if hessian_out is not None:
        moved = hessian_out @ moved
    return (moved * error).sum(dtype=torch.float64)
