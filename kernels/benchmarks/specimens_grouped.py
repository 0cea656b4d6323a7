"""The Triton kernel of experts with the arguments of typical launches: see `specimens`."""

from __future__ import annotations

from typing import Any

from specimen import FAMILIES, Specimen, family_of

from quip_kernels.gpu import grouped


def _grouped(block: int, terms: int, signed: bool, gather: bool, warps: int, even: bool = True) -> Specimen:
    def tiles(gpu: Any) -> list[grouped.Tile]:
        return [tile for tile in grouped.tiles(block, family_of(gpu)) if (tile.gather, tile.warps) == (gather, warps)]

    return Specimen(
        grouped.grouped_kernel,
        {
            "values": "*fp16",
            "scales": "*fp32",
            "ends": "*i64",
            "codes": "*i16" if signed else "*u8",
            "table": "*i32",
            "parts": "*fp32",
            "vectors": "i32",
            "experts": "i32",
            "rows": "i32",
            "columns": "i32",
            "blocks_per_part": "i32",
            "factor": "fp32",
        },
        {
            "SIGNED": signed,
            "TERMS": terms,
            "EXPERTS": 128,
            "BLOCK_VECTORS": block,
            "BLOCK_ROWS": grouped.BLOCK_ROWS,
            "BLOCK_CODES": grouped.BLOCK_CODES,
            "GATHER": gather,
        },
        warps=warps,
        stages=lambda gpu: tiles(gpu)[0].stages,
        multiples=("columns",) if even else (),
        weights_in_loop=grouped.BLOCK_ROWS * grouped.BLOCK_CODES * 8,
        launched=lambda gpu: len(tiles(gpu)) > 0,
    )


GROUPED = {
    **{
        f"grouped {'e8p' if signed else 'e8'} {block}x{terms} {'gather' if gather else 'load'} {warps}": (
            _grouped(block, terms, signed, gather, warps)
        )
        for signed in (True, False)
        for block in (16, 32, 64)
        for terms in (1, 2)
        for gather, warps in dict.fromkeys(tile[:2] for family in FAMILIES for tile in grouped.tiles(block, family))
    },
    **{
        f"grouped e8p {block}x{terms} uneven": _grouped(block, terms, True, *tile[:2], even=False)
        for block in (16, 64)
        for terms in (1, 2)
        for tile in grouped.tiles(block, "cuda")[:1]
    },
}
