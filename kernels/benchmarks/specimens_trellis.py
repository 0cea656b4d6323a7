"""The Triton kernels of trellis codes with the arguments of typical launches: see `specimens`."""

from __future__ import annotations

from typing import Any

from specimen import Specimen, arch_of

from quip_kernels.gpu.trellis import block as trellis_block
from quip_kernels.gpu.trellis import trellis_dequantize_kernel, trellis_matvec_kernel
from quip_kernels.gpu.viterbi import MOST_TOGETHER as VITERBI_EDGES
from quip_kernels.gpu.viterbi import viterbi_kernel


def _trellis_constants(code: str, k: float, order: str, table_bits: int, step: int, halves: bool) -> dict[str, Any]:
    return {
        "PAIR_BITS": int(2 * k),
        "CODE": code,
        "ORDER": order,
        "STEP": step,
        "TABLE_BITS": table_bits,
        "HALVES": halves,
        "ARCH": arch_of,
    }


def _trellis_matvec(vectors: int, *layout: Any) -> Specimen:
    block = trellis_block(vectors)
    return Specimen(
        trellis_matvec_kernel,
        {
            "x": "*fp32",
            "codes": "*i16",
            "table": _trellis_table(*layout),
            "parts": "*fp32",
            "tile_rows": "i32",
            "tiles": "i32",
            "vectors": "i32",
            "tiles_per_part": "i32",
            "factor": "fp32",
        },
        {**_trellis_constants(*layout), "VECTORS": vectors, "BLOCK": block},
        weights_in_loop=256 * block,
    )


def _trellis_dequantize(*layout: Any) -> Specimen:
    return Specimen(
        trellis_dequantize_kernel,
        {"codes": "*i16", "table": _trellis_table(*layout), "weight": "*fp16", "tiles": "i32", "divisor": "fp32"},
        {**_trellis_constants(*layout), "BLOCK": 8},
    )


def _viterbi(bits: int, weights: int, doublings: int, closed: bool) -> Specimen:
    return Specimen(
        viterbi_kernel,
        {
            "x": "*i16",
            "levels": "*i16",
            "costs": "*i32",
            "choices": "*i16",
            "seams": "*i32",
            "states": "*i32",
            "begin": "i32",
            "count": "i32",
            "opened": "i32",
            "steps": "i32",
            "even": "i32",
            "odd": "i32",
        },
        {
            "CLOSED": closed,
            "BITS": 16,
            "LEAST": bits,
            "WEIGHTS": weights,
            "DOUBLINGS": doublings,
            "WIDTH": min(VITERBI_EDGES, 1 << (16 - bits)),
        },
        warps=8,
    )


def _trellis_table(code: str, k: float, order: str, table_bits: int, step: int, halves: bool) -> str:
    return "*i32" if halves else "*fp32" if table_bits else "*i16"


# code, bits, order, bits and columns of the table, whether it is float16
_TRELLIS = {
    **{
        f"{code} k{k} {order}": (code, k, order, 0, 1, False)
        for code, k, order in (
            ("1mad", 2, "rows"),
            ("2mad", 2, "rows"),
            ("3inst", 2, "rows"),
            ("3inst", 3, "exl3"),
            ("mcg", 4, "exl3"),
            ("mul1", 1, "exl3"),
            ("mul1", 2, "exl3"),
            ("mul1", 1.5, "exl3"),
            ("mul1", 2.5, "exl3"),
            ("mul1", 3.5, "exl3"),
            ("mul1", 5, "exl3"),
            ("mul1", 8, "exl3"),
        )
    },
    "hyb k2 qtip": ("hyb", 2, "qtip", 9, 2, True),
    "hyb k4 qtip": ("hyb", 4, "qtip", 9, 2, True),
    "hyb k2 qtip fp32": ("hyb", 2, "qtip", 9, 2, False),
    "quantlut k3 rows": ("quantlut", 3, "rows", 9, 1, False),
    "lut k2 rows": ("lut", 2, "rows", 16, 2, True),
}

# new bits of a state, its weights, doublings
_VITERBI = [(2, 1, 0), (4, 1, 2), (4, 2, 0), (8, 1, 6), (16, 2, 5)]

TRELLIS = {
    **{
        f"viterbi {' '.join(map(str, layout))} {'closed' if closed else 'free'}": _viterbi(*layout, closed)
        for layout in _VITERBI
        for closed in (True, False)
    },
    **{f"trellis {name} {v}": _trellis_matvec(v, *layout) for name, layout in _TRELLIS.items() for v in (1, 2, 4)},
    **{f"trellis {name} dequantize": _trellis_dequantize(*layout) for name, layout in _TRELLIS.items()},
}
