"""Two-sided LDLQ: adaptive rounding for the model's output instead of the layer's (YAQA, arXiv 2505.22988)."""

from __future__ import annotations

import torch

from .base import Problem, Rounded, Rounding, proxy_loss
from .ldlq import LDLQ, block_ldl
from .sequential import inverse_of_blocks, round_with_feedback, sweep, sweep_feedback

# Rows that are rounded together: fewer use more of the output Hessian, more are faster. Codes of tiles need at least 16.
ROWS = 8


class YAQA(Rounding):
    """LDLQ with feedback from the columns and from the rows that are rounded already.

    With the errors E = W − Ŵ, tr(E H Eᵀ H_out) is the second-order change of the model's loss. Let H = 𝓛 D 𝓛ᵀ and
    H_out = 𝓜 C 𝓜ᵀ be block LDL decompositions. Groups of rows are rounded from the last to the first, and in a group the
    blocks of columns from the last to the first. The target of a block is

        T = W + [ 𝓜ᵀ E 𝓛 − E ],

    where E holds the errors of everything that is rounded already. The sum over the lower rows a needs only the products
    (E 𝓛)_a, which are computed once for each group. Without H_out, and with H_out = I, this is LDLQ.

    A sweep visits the rows again, one by one (or those that the codebook codes together). For fixed other rows, the loss of
    row g is H_out[g, g] times the one-sided loss of the weight W_g + Σ_{a≠g} H_out[g, a] E_a / H_out[g, g], so one pass of
    coordinate descent over its columns follows. Sweeps end when the two-sided loss no longer falls.
    """

    name = "yaqa"
    needs_hessian = True
    rows_independent = False
    two_sided = True

    def round(self, problem: Problem) -> Rounded:
        """See [`Rounding.round`]."""
        if problem.hessian_out is None:
            return LDLQ().round(problem)
        weight, book = problem.weight, problem.codebook
        hessian, out = problem.required_hessian, problem.hessian_out
        height = -(-ROWS // book.rows_together) * book.rows_together
        factor = block_ldl(hessian, book.block_size)
        factor_out = _ragged_ldl(out, height)
        rounded = Rounded(
            torch.empty(book.codes_shape(*weight.shape), dtype=book.code_dtype, device=weight.device),
            torch.zeros_like(weight),
        )
        moved = torch.zeros_like(weight)  # E 𝓛 of the groups that are done
        for rows in _groups(len(weight), height):
            below = slice(rows.stop, None)
            offset = factor_out[below, rows].T @ moved[below]
            codes, points = round_with_feedback(weight[rows], factor, book, offset)
            self._put(rounded, rows, codes, points, book.rows_together)
            moved[rows] = (weight[rows] - points) @ factor
        loss = proxy_loss(weight - rounded.points, hessian, out)
        conditional = inverse_of_blocks(hessian, book.block_size)
        feedback = sweep_feedback(hessian, conditional, book.block_size) if problem.sweeps else []
        for _ in range(problem.sweeps):
            again = self._sweep(problem, conditional, feedback, rounded)
            new = proxy_loss(weight - again.points, hessian, out)
            if not new < loss:
                break
            rounded, loss = again, new
        return rounded

    def _sweep(
        self, problem: Problem, conditional: torch.Tensor, feedback: list[torch.Tensor], rounded: Rounded
    ) -> Rounded:
        """One visit of every row; returns new codes and points."""
        weight, book, out = problem.weight, problem.codebook, problem.hessian_out
        assert out is not None
        result = Rounded(rounded.codes.clone(), rounded.points.clone())
        error = weight - result.points
        for rows in _groups(len(weight), book.rows_together):
            others = out[rows] @ error - out[rows, rows] @ error[rows]
            # without a check, for which the host would wait: a diagonal block of a positive definite matrix has an inverse
            target = weight[rows] + torch.linalg.solve_ex(out[rows, rows], others)[0]
            part = slice(rows.start // book.rows_together, rows.stop // book.rows_together)
            found = Rounded(result.codes[part].clone(), result.points[rows].clone())
            sweep(Problem(target, problem.hessian, book), conditional, found, feedback)
            self._put(result, rows, *found, book.rows_together)
            error[rows] = weight[rows] - found.points
        return result

    @staticmethod
    def _put(rounded: Rounded, rows: slice, codes: torch.Tensor, points: torch.Tensor, together: int) -> None:
        rounded.codes[rows.start // together : rows.stop // together] = codes
        rounded.points[rows] = points


def _groups(rows: int, height: int) -> list[slice]:
    """Ranges of this many rows, from the last to the first; the last one may be smaller."""
    return [slice(begin, min(begin + height, rows)) for begin in reversed(range(0, rows, height))]


def _ragged_ldl(hessian: torch.Tensor, size: int) -> torch.Tensor:
    """[`block_ldl`] of a matrix whose last block may be smaller: an independent part completes it, and is cut off."""
    rows = len(hessian)
    missing = -rows % size
    completed = torch.block_diag(hessian, torch.eye(missing, dtype=hessian.dtype, device=hessian.device))
    return block_ldl(completed, size)[:rows, :rows]
