"""One embedding table: every row by itself, with a scale of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .. import codebooks, incoherence, rounding
from .layer import CHUNK, QuantizedWeight, check_weight, stored

if TYPE_CHECKING:
    from ..config import QuipConfig


@torch.no_grad()
def quantize_embedding(table: torch.Tensor, config: QuipConfig, name: str) -> QuantizedWeight:
    """Quantize the table of an embedding, with or without calibration alike.

    A token's input to the table is a unit vector, so that the Hessian between tokens is diagonal, whatever the data: there
    is nothing to feed an error back to, and every rounding method of the papers becomes rounding to the nearest points.
    Rows may differ in length (SmolLM2's by a factor of three), which a transform between them would even out but a look-up
    cannot undo; so every row is scaled by itself, which costs nothing, since sv is stored anyway.

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
    method = rounding.get(config.rounding)
    if method.needs_hessian:
        method = rounding.get("nearest")
    factors = book.scale_factors if config.scale == "auto" else (float(config.scale),)
    su = incoherence.signs(columns, config.seed, "in").to(table.device)
    transform = incoherence.get(incoherence.sides(config.incoherence)[0], columns, config.seed)
    codes = torch.empty(book.codes_shape(rows, columns), dtype=book.code_dtype, device=table.device)
    sv = torch.empty(rows, device=table.device)
    lost = total = 0.0
    at_once = max(CHUNK // columns, 1)
    for begin in range(0, rows, at_once):
        chunk = slice(begin, begin + at_once)
        rotated = transform.apply_transpose(table[chunk].float() * su)
        energy = rotated.square().sum(1)
        unit = (energy / columns).sqrt()[:, None] / book.gaussian_scale
        unit = torch.where(unit > 0, unit, 1)
        padded = torch.nn.functional.pad(rotated, (0, -columns % book.block_size))
        least = torch.full_like(energy, torch.inf)
        for factor in factors:
            found, points = method.round(padded * (factor / unit), None, book, 0, config.seed + begin)
            points = points[:, :columns]
            fitted = (points * rotated).sum(1) / points.square().sum(1)
            errors = (rotated - points * fitted[:, None]).square().sum(1)
            better = errors < least
            least = torch.where(better, errors, least)
            sv[chunk] = torch.where(better, fitted, sv[chunk])
            codes[chunk] = torch.where(better.reshape(-1, *[1] * (codes.ndim - 1)), found, codes[chunk])
        lost += least.sum(dtype=torch.float64).item()
        total += energy.sum(dtype=torch.float64).item()
    return QuantizedWeight(stored(book, codes), su, sv, {"relative_error": lost / total if total else 0.0})
