"""One embedding table: every row is quantized separately, with its own scale."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .. import codebooks, incoherence
from ..rounding import Problem
from .layer import (
    QuantizedWeight,
    check_shape,
    check_weight,
    chunks_of_rows,
    method_without_hessian,
    stored,
    warn_of_storage,
)

if TYPE_CHECKING:
    from ..config import QuipConfig


@torch.inference_mode(False)
@torch.no_grad()
def quantize_embedding(table: torch.Tensor, config: QuipConfig, name: str) -> QuantizedWeight:
    """Quantize the table of an embedding, in the same way with and without calibration.

    A token's input to the table is a unit vector, so the Hessian between tokens is diagonal, whatever the data. Errors
    cannot be fed back, and every rounding method of the papers becomes rounding to the nearest points.
    Rows may differ in length (SmolLM2's by a factor of three), which a transform between them would even out but a look-up
    cannot undo; so every row is scaled by itself, which costs nothing, since sv is stored anyway. Rows that
    the codebook codes together share only the multiple of the scale that is tried.

    Args:
        table: float [m, n].
        config: `codebook_spec`, `incoherence` (of a pair, the input side), `rounding` ("stochastic" or else
            the nearest points), `scale` ("auto": the best of some multiples for each row) and `seed` are read.
        name: of the module, for errors.

    Returns:
        su are signs, and sv [m] the scales of least squared error for the codes as they are (0 for a row of zeros).

    Raises:
        ValueError: the table has NaN or Inf; the message names the module.
    """
    check_weight(name, table)
    rows, columns = table.shape
    book = codebooks.get(config.codebook_spec)
    check_shape(name, table, book)
    method = method_without_hessian(config)
    factors = book.scale_factors if config.scale == "auto" else (float(config.scale),)
    su = incoherence.signs(columns, config.seed, "in").to(table.device)
    transform = incoherence.get(incoherence.sides(config.incoherence)[0], columns, config.seed)
    codes = torch.empty(book.codes_shape(rows, columns), dtype=book.code_dtype, device=table.device)
    sv, energies = torch.zeros(rows, device=table.device), torch.zeros(rows, device=table.device)
    lost = total = 0.0
    for begin, end in chunks_of_rows(rows, columns, book, method):
        rotated = transform.apply_transpose(table[begin:end].float() * su)
        energy = rotated.square().sum(1)
        unit = (energy / columns).sqrt()[:, None] / book.gaussian_scale
        unit = torch.where(unit > 0, unit, 1)
        missing = -len(rotated) % book.rows_together
        padded = torch.nn.functional.pad(rotated, (0, -columns % book.block_size, 0, missing))
        groups = slice(begin // book.rows_together, (end + missing) // book.rows_together)
        least = torch.full((groups.stop - groups.start,), torch.inf, device=table.device)
        for factor in factors:
            scale = torch.nn.functional.pad(factor / unit, (0, 0, 0, missing), value=1.0)
            found, points = method.round(Problem(padded * scale, None, book, seed=config.seed + begin))
            points = points[: len(rotated), :columns]
            found_energy = points.square().sum(1)
            fitted = (points * rotated).sum(1) / found_energy.clamp_min(torch.finfo(torch.float32).tiny)
            errors = (rotated - points * fitted[:, None]).square().sum(1)
            together = torch.nn.functional.pad(errors, (0, missing)).reshape(-1, book.rows_together).sum(1)
            better = together < least
            least = torch.where(better, together, least)
            codes[groups] = torch.where(better.reshape(-1, *[1] * (codes.ndim - 1)), found, codes[groups])
            better = better.repeat_interleave(book.rows_together)[: len(rotated)]
            sv[begin:end] = torch.where(better, fitted, sv[begin:end])
            energies[begin:end] = torch.where(better, found_energy, energies[begin:end])
        lost += least.sum(dtype=torch.float64).item()
        total += energy.sum(dtype=torch.float64).item()
    warn_of_storage(name, table.dtype, sv, energies, lost, total)
    return QuantizedWeight(stored(book, codes), su, sv, {"relative_error": lost / total if total else 0.0})
