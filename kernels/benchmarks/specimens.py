"""Every Triton kernel with the arguments of a typical launch, to be compiled ahead of time."""

from __future__ import annotations

from typing import Any

import triton.language as tl
from specimen import FAMILIES, Specimen, arch_of, family_of
from specimens_grouped import GROUPED
from specimens_nearest import NEAREST
from specimens_trellis import TRELLIS

from quip_kernels.gpu.dequantize import dequantize_kernel
from quip_kernels.gpu.matvec import Tile, matvec_kernel, tiles
from quip_kernels.gpu.quantize import quantize_kernel
from quip_kernels.gpu.small_batch import BLOCK_ROWS, BLOCK_WORDS, halves_kernel, small_batch_kernel
from quip_kernels.gpu.small_batch import Tile as SmallBatchTile
from quip_kernels.gpu.small_batch import tiles as small_batch_tiles
from quip_kernels.gpu.transform import factor_kernel, is_fused, sylvester_kernel, sylvester_quantize_kernel
from quip_kernels.gpu.transform import tile as transform_tile
from quip_kernels.gpu.transform import warps as transform_warps


def _matvec(vectors: int, digits: int, signed: bool, tile: Tile, even: bool = True) -> Specimen:
    return Specimen(
        matvec_kernel,
        {
            "digits": "*i32",
            "sums": "*i32",
            "scales": "*fp32",
            "planes": "*i32",
            "table": "*i32",
            "parts": "*fp32",
            "rows": "i32",
            "vectors": "i32",
            "quads": "i32",
            "blocks_per_part": "i32",
            "factor": "fp32",
        },
        {
            "SIGNED": signed,
            "VECTORS": tile.vectors,
            "DIGITS": digits,
            "BLOCK_ROWS": tile.rows,
            "BLOCK_WORDS": tile.words,
            "EVEN": even,
            "GATHER": tile.gather,
            "MERGE": lambda gpu: tiles(vectors, digits, gpu.backend)[0].merge,
            "ARCH": arch_of,
        },
        warps=tile.warps,
        weights_in_loop=tile.rows * tile.words * 32,
    )


def _matvecs(vectors: int, digits: int, signed: bool) -> dict[str, Specimen]:
    """One for each tile that is compiled on its own."""
    form = "e8p" if signed else "e8"
    return {
        f"matvec {form} {tile.vectors}x{digits} {'gather' if tile.gather else 'load'} {tile.rows}": _matvec(
            vectors, digits, signed, tile
        )
        for tile in tiles(vectors, digits, "cuda")
    }


def _small_batch(batch: int, terms: int, signed: bool, gather: bool, warps: int) -> Specimen:
    def tiles(gpu: Any) -> list[SmallBatchTile]:
        return [tile for tile in small_batch_tiles(batch, family_of(gpu)) if (tile.gather, tile.warps) == (gather, warps)]

    return Specimen(
        small_batch_kernel,
        {
            "values": "*fp16",
            "scales": "*fp32",
            "planes": "*i32",
            "table": "*i32",
            "parts": "*fp32",
            "batch": "i32",
            "rows": "i32",
            "quads": "i32",
            "blocks_per_part": "i32",
            "factor": "fp32",
        },
        {
            "SIGNED": signed,
            "TERMS": terms,
            "BLOCK_BATCH": batch,
            "BLOCK_ROWS": BLOCK_ROWS,
            "BLOCK_WORDS": BLOCK_WORDS,
            "GATHER": gather,
        },
        warps=warps,
        stages=lambda gpu: tiles(gpu)[0].stages,
        weights_in_loop=BLOCK_ROWS * BLOCK_WORDS * 32,
        launched=lambda gpu: len(tiles(gpu)) > 0,
    )


def _dequantize(residual: bool, residual_signed: bool, dtype: str) -> Specimen:
    pointers = ("planes", "table", *(("residual", "residual_table") if residual else ()))
    return Specimen(
        dequantize_kernel,
        {
            **dict.fromkeys(pointers, "*i32"),
            "residual_scale": "fp32",
            "weight": "*" + dtype,
            "rows": "i32",
            "quads": "i32",
            "columns": "i32",
        },
        {
            **({} if residual else {"residual": None, "residual_table": None}),
            "SIGNED": True,
            "RESIDUAL_SIGNED": residual_signed,
            "BLOCK_ROWS": 16,
            "BLOCK_WORDS": 8,
        },
    )


def _sylvester(power: int, dtype: str, terms: int) -> Specimen:
    a, b = transform_tile(power)
    return Specimen(
        sylvester_kernel,
        {
            "x": "*fp32",
            "pre": "*" + dtype,
            "post": "*" + dtype,
            "bias": "*" + dtype,
            "y": "*" + dtype,
            "columns": "i32",
            "parts": "i32",
            "part_stride": "i32",
            "scale": "fp32",
        },
        {"which": None, "row_scale": None, "A": a, "B": b, "P": power, "TERMS": terms, "TERM": tl.bfloat16},
        warps=lambda gpu: transform_warps(a * b, family_of(gpu)),
    )


def _sylvester_quantize(power: int, digits: int, dtype: str, terms: int) -> Specimen:
    a, b = transform_tile(power)
    return Specimen(
        sylvester_quantize_kernel,
        {
            "x": "*" + dtype,
            "pre": "*" + dtype,
            "digits": "*i32",
            "sums": "*i32",
            "scales": "*fp32",
            "words": "i32",
            "scale": "fp32",
        },
        {"A": a, "B": b, "DIGITS": digits, "TERMS": terms, "TERM": tl.bfloat16},
        warps=lambda gpu: transform_warps(power, family_of(gpu)),
        launched=lambda gpu: is_fused(power, family_of(gpu)),
    )


def _factor(order: int, terms: int) -> Specimen:
    block = 32 if order > 16 else 16
    return Specimen(
        factor_kernel,
        {
            "x": "*fp32",
            "pre": "*bf16",
            "row_scale": "*fp32",
            "factor": "*i8" if terms else "*fp32",
            "y": "*fp32",
            "groups": "i32",
            "before": "i32",
            "after": "i32",
            "parts": "i32",
            "part_stride": "i32",
            "scale": "fp32",
        },
        {
            "which": None,
            "post": None,
            "bias": None,
            "ORDER": order,
            "BLOCK_I": block,
            "BLOCK_J": block,
            "BLOCK_G": 64,
            "TRANSPOSE": True,
            "TERMS": terms,
            "TERM": tl.bfloat16,
        },
    )


SPECIMENS = {
    **TRELLIS,
    **GROUPED,
    **NEAREST,
    **{
        name: specimen
        for signed in (True, False)
        for vectors in (1, 2, 3, 4)
        for digits in (1, 2, 3)
        for name, specimen in _matvecs(vectors, digits, signed).items()
    },
    **{
        f"matvec e8p {vectors}x{digits} uneven": _matvec(
            vectors, digits, True, tiles(vectors, digits, "cuda")[0], even=False
        )
        for vectors, digits in ((1, 1), (1, 2), (1, 3), (2, 3), (4, 1), (4, 2))
    },
    "dequantize": _dequantize(False, False, "fp16"),
    "dequantize rvq3": _dequantize(True, False, "fp16"),
    "dequantize rvq4": _dequantize(True, True, "fp32"),
    **{
        f"quantize {digits}": Specimen(
            quantize_kernel,
            {"x": "*fp32", "digits": "*i32", "sums": "*i32", "scales": "*fp32", "columns": "i32", "words": "i32"},
            {"DIGITS": digits, "BLOCK": 1024},
            warps=8,
        )
        for digits in (1, 2, 3)
    },
    **{
        f"halves {terms}": Specimen(
            halves_kernel,
            {
                "x": "*fp32",
                "values": "*fp16",
                "scales": "*fp32",
                "columns": "i32",
                "width": "i32",
                "limit": "fp32",
                "term_stride": "i32",
            },
            {"TERMS": terms, "BLOCK": 2048},
        )
        for terms in (1, 2)
    },
    **{
        f"small batch {'e8p' if signed else 'e8'} {batch}x{terms} {'gather' if gather else 'load'} {warps}": (
            _small_batch(batch, terms, signed, gather, warps)
        )
        for signed in (True, False)
        for batch in (16, 32, 64)
        for terms in (1, 2)
        for gather, warps in dict.fromkeys(tile[:2] for family in FAMILIES for tile in small_batch_tiles(batch, family))
    },
    **{
        f"sylvester {power} {dtype}": _sylvester(power, dtype, 3 if dtype == "fp32" else 2)
        for power in (1, 16, 128, 256, 512, 1024, 2048, 4096)
        for dtype in ("fp16", "fp32")
        if power in (128, 2048, 4096) or dtype == "fp32"
    },
    **{
        f"sylvester quantize {power} {digits}": _sylvester_quantize(
            power, digits, "fp32" if digits == 3 else "bf16", 2 + digits // 3
        )
        for power, digits in ((256, 2), (1024, 2), (2048, 2), (4096, 1), (4096, 2), (4096, 3))
    },
    **{
        f"factor {order} terms {terms}": _factor(order, terms)
        for order, terms in ((12, 3), (12, 0), (28, 2), (172, 3), (172, 0))
    },
}
