"""Checkpoints of ExLlamaV3 ("exl3"): trellis codes of 1 to 8 bits, chosen for each linear.

The format was derived from the published package, up to version 1.6; since 1.5 it also has 1.5, 2.5 and 3.5 bits.
`config.json` has a "quantization_config" with quant_method "exl3", but only the tensors tell how each linear is stored.
With n' and m' the next multiples of 128, and H the Hadamard transform of blocks of 128 numbers,

    y = C_m ( svh ⊙ H Ŵ H C_nᵀ ( suh ⊙ x ) ) + bias

A quantized embedding has a 2-dimensional `trellis` (`codebooks/trellis_rows.py`) and `signs`. With n' the next multiple of
256 and H of blocks of 256 numbers, row i of the table is C_n ( signs ⊙ H ŵ_i ).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from ...codebooks.trellis import WHOLE_BITS
from ...codebooks.trellis_rows import GROUP, TrellisRows
from ...config.storage import Storage
from ..headers import DAMAGED
from . import exl3_folded, trellis_bits
from .family import FLOATING, Family, Form, Source

# The newest version of exllamav3 whose files have been read.
KNOWN = "1.6"
_BLOCK = 128


class Exl3(Family):
    """See the file's description."""

    name = "EXL3"
    marker = "trellis"
    kinds = ("trellis", "suh", "svh", "su", "sv", "mcg", "mul1", "scale", "signs")
    refused = MappingProxyType(
        {
            "slices of a wide MLP": r"_proj\.slice\.\d+$",
            "hashed n-gram embeddings": r"(^|\.)ngram_embedding(\.shard_\d+)?$",
            "embeddings in several shards": r"\.shard_\d+$",
        }
    )

    def check(self, parameters: Mapping[str, Any]) -> None:
        """See [`Family.check`]. Accepts everything: versions differ in the tensors only."""

    def folded_factor(self, config: Any, name: str) -> float:
        """See [`Family.folded_factor`]."""
        return exl3_folded.folded_factor(config, name)

    def is_table(self, source: Source) -> bool:
        """See [`Family.is_table`]."""
        return "signs" in source.tensors

    def describe_table(self, source: Source, rows: int, columns: int, parameters: Mapping[str, Any]) -> Form:
        """See [`Family.describe_table`]."""
        groups = -(-columns // GROUP)
        source.require("signs", FLOATING, (groups, GROUP))
        shape = source.require("trellis", ("I16",))
        k, rest = divmod(shape[1] - groups, 16 * groups) if len(shape) == 2 else (0, 1)
        if rest or k not in WHOLE_BITS:
            raise ValueError(
                f"{source.name}.trellis has shape {list(shape)}; supported are the tables of exllamav3 up to {KNOWN}, "
                f"{groups}·(1 + 16·K) words in a row with K = 1 to 8 bits. {_made_by(parameters)}"
            )
        source.require("trellis", ("I16",), (rows, shape[1]))
        extra = [kind for kind in ("suh", "svh", "su", "sv", "bias") if kind in source.tensors]
        if extra:
            raise ValueError(f"{source.name} has signs, as embeddings have, and also {extra[0]}: {DAMAGED}")
        padded = (rows, groups * GROUP)
        return Form(
            rows,
            columns,
            TrellisRows(k).name,
            ("hadamard-256", "hadamard-256"),
            storage=Storage(None if padded == (rows, columns) else padded),
        )

    def describe(self, source: Source, rows: int, columns: int, parameters: Mapping[str, Any]) -> Form:
        """See [`Family.describe`]."""
        if "scale" in source.tensors:
            raise ValueError(f"{source.name}.scale: EXL3 files of that early version are not supported")
        padded_rows, padded_columns = (-(-size // _BLOCK) * _BLOCK for size in (rows, columns))
        shape = source.require("trellis", ("I16",))
        code = next((name for name in ("mcg", "mul1") if name in source.tensors), "3inst")
        if len(shape) != 3 or shape[2] not in trellis_bits.EXL3_WORDS:
            raise ValueError(
                f"{source.name}.trellis has shape {list(shape)}; supported are the forms of exllamav3 up to {KNOWN}, 16·K "
                f"words in a tile with K = 1 to 8, 1.5, 2.5 or 3.5 bits. {_made_by(parameters)}"
            )
        if shape[2] % 16 and code != "mul1":
            raise ValueError(
                f"{source.name}.trellis has {shape[2] / 16} bits, which only code mul1 has, and {source.name}.mul1 is "
                f"missing: {DAMAGED}"
            )
        source.require("trellis", ("I16",), (padded_columns // 16, padded_rows // 16, shape[2]))
        for vector, signs, size in (("suh", "su", padded_columns), ("svh", "sv", padded_rows)):
            if vector in source.tensors:
                source.require(vector, FLOATING, (size,))
            elif signs in source.tensors:
                source.require(signs, ("I16",), (size // 16,))
            else:
                raise ValueError(f"{source.name} has neither {vector} nor {signs}: {DAMAGED}")
        padded = (padded_rows, padded_columns)
        return Form(
            rows,
            columns,
            f"trellis:{code}:k{shape[2] / 16:g}:exl3",
            ("hadamard-128", "hadamard-128"),
            storage=Storage(None if padded == (rows, columns) else padded, scales_dtype="float32"),
        )

    def repack(self, tensors: Mapping[str, torch.Tensor], form: Form) -> dict[str, torch.Tensor]:
        """See [`Family.repack`]."""
        if "signs" in tensors:
            codes = tensors["trellis"]
            if not TrellisRows.parse(form.codebook).scales(codes).isfinite().all():
                raise ValueError(f"The scales of the rows of an embedding are not all finite: {DAMAGED}")
            signs = tensors["signs"].float().flatten()
            return {"codes": codes, "su": signs, "sv": torch.ones(form.rows, device=codes.device)}
        return {
            "codes": trellis_bits.from_exl3(tensors["trellis"]),
            "su": tensors["suh"].float() if "suh" in tensors else _signs(tensors["su"]),
            "sv": tensors["svh"].float() if "svh" in tensors else _signs(tensors["sv"]),
        }


def _made_by(parameters: Mapping[str, Any]) -> str:
    version = parameters.get("version")
    return "The checkpoint " + ("does not tell its version" if version is None else f"was made by exllamav3 {version}")


def _signs(words: torch.Tensor) -> torch.Tensor:
    """float32 [16·w] of ±1 out of int16 [w]: from the lowest bit on, a bit that is set means −1."""
    bits = (words.to(torch.int32)[:, None] >> torch.arange(16, dtype=torch.int32, device=words.device)) & 1
    return (1 - 2 * bits).float().flatten()
