"""The Triton kernels that encode weights with E8P and grids, with the arguments of typical launches: see `specimens`."""

from __future__ import annotations

import torch
from specimen import Specimen

from quip_kernels import nearest as tables
from quip_kernels.gpu import nearest as kernels

# Rows and warps of a program on a device.
ROWS, WARPS = 8, 4
_EVEN, _ODD, _COUNT = tables.candidates(torch.device("cpu")).ends
_TABLES = {"vectors": "*fp32", "biases": "*fp32", "about": "*i32", "signed": "*fp32", "e8": "*fp32", "scale": "fp32"}
_PANEL = {"target": "*fp32", "base": "*fp32", "feedback": "*fp32"}
_RESULTS = {"points": "*fp32", "delta": "*fp32", "rows": "i32"}


def _constants(second: str | None) -> dict[str, int]:
    return {
        "COUNT": _COUNT,
        "EVEN": _EVEN,
        "ODD": _ODD,
        "TOGETHER": tables.TOGETHER,
        "SECOND": kernels.SECOND[second],
        "BLOCK_ROWS": ROWS,
    }


def _encode(second: str | None) -> Specimen:
    codes = "*i32" if second else "*i16"
    arguments = {"x": "*fp32", **_TABLES, "codes": codes, "points": "*fp32", "rows": "i32"}
    return Specimen(kernels.encode_kernel, arguments, _constants(second))


def _panel(codes: str, constants: dict[str, int]) -> Specimen:
    arguments = {**_PANEL, **_TABLES, "codes": codes, **_RESULTS, "blocks": "i32"}
    return Specimen(kernels.panel_kernel, arguments, {**constants, "WIDTH": kernels.MOST_COLUMNS})


_GRID = {"COUNT": 0, "EVEN": 0, "ODD": 0, "TOGETHER": 0, "SECOND": kernels.GRID.value, "BLOCK_ROWS": ROWS}
NEAREST = {
    **{f"nearest {second or 'one stage'}": _encode(second) for second in kernels.SECOND},
    **{
        f"panel {second or 'one stage'}": _panel("*i32" if second else "*i16", _constants(second))
        for second in kernels.SECOND
    },
    "panel scalar": _panel("*u8", _GRID),
}
