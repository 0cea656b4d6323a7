"""The form of trellis codes with one byte a weight, which processors with AVX2 multiply several times as fast as codes.

codes                records
int16 [m, n/16·K]    int8 [m/16, 64 + 2nK (up to a multiple of 64) + 16n]

A record has the codes of a row of tiles as they are stored, and their weights rounded to multiples of the largest one
divided by 127 (`trellis_bytes.c`). The values of codes are about Gaussian and end at 3.2 to 4.5 times their rms, so that
rounding changes products by 0.7 to 1 % of their rms: about as much as activations of 8 bits do. `cpu_trellis.expand` makes
records.
"""

from __future__ import annotations

import torch

TILE = 16
_HEAD = 64
# With more bits, the rounding would add more than 2 % to the squared error of the codes themselves.
MOST_PAIR_BITS = 8
# A table whose largest value is more than this many times its rms would be rounded too coarsely.
MOST_PEAK = 5.0


def is_records(codes: torch.Tensor) -> bool:
    """Whether this tensor of a weight is records, and not codes."""
    return codes.dtype is torch.int8 and codes.ndim == 2


def can_expand(codes: torch.Tensor, pair_bits: int, table: torch.Tensor | None = None) -> bool:
    """Whether these are codes on the CPU, of so few bits and of such a table that rounding costs as little as that."""
    if codes.dtype is not torch.int16 or codes.ndim != 2 or not codes.is_cpu or codes.numel() == 0:
        return False
    if pair_bits > MOST_PAIR_BITS:
        return False
    if table is None:
        return True
    values = table.double()
    return bool(values.abs().max() < MOST_PEAK * values.square().mean().sqrt())


def shape_of_records(rows: int, columns: int, pair_bits: int) -> tuple[int, int]:
    """Of the records of a [rows, columns] weight."""
    return rows // TILE, _width(columns, pair_bits)


def _width(columns: int, pair_bits: int) -> int:
    return _HEAD + -(-columns * pair_bits // _HEAD) * _HEAD + TILE * columns


def columns_of_records(records: torch.Tensor, pair_bits: int) -> int:
    """Columns of the weight. Raises `ValueError` for a tensor that is not records on the CPU."""
    # what fills up the codes is less than a tile
    columns = (records.shape[-1] - _HEAD) // (TILE + pair_bits) // TILE * TILE
    if not is_records(records) or not records.is_cpu or records.shape[1] != _width(columns, pair_bits) or columns < TILE:
        raise ValueError(
            f"records must be int8 [m/{TILE}, {_HEAD} + bytes of codes + bytes of weights] on the CPU, got {records.dtype} "
            f"{list(records.shape)} on {records.device}"
        )
    return columns


def collapse(records: torch.Tensor, pair_bits: int) -> torch.Tensor:
    """The codes of records, int16 [m, n/16·K]. Raises `ValueError` as [`columns_of_records`]."""
    codes = records[:, _HEAD : _HEAD + columns_of_records(records, pair_bits) * pair_bits].contiguous()
    return codes.view(torch.int16).reshape(len(records) * TILE, -1)
