"""Checkpoints of QuIP-for-all (chu-tianxiang/QuIP-for-all): the codebooks of QuIP# for any architecture.

The format was derived from the published package; `config.json` has a "quantization_config" with quant_method "QUiP". A
linear is, with the sizes m', n' of the codes,

    y = SV ⊙ C_m Q_m' ( Wscale ⊙ Ŵ Q_n'ᵀ C_nᵀ ( SU ⊙ x ) ) + bias

SU, SV or both may have been merged into the neighbouring layers, and are missing then.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch

from ...codebooks.residual import PUBLISHED_RESIDUAL_SCALES
from ...config.storage import Storage
from ...incoherence import STORED
from ...incoherence.quip_for_all import ORDERS
from ..headers import DAMAGED
from . import lattice_bits
from .family import FLOATING, Family, Form, Source, is_finite_number, is_one_of, is_true, zeros_beyond

logger = logging.getLogger(__name__)

# codebook → native codebook, type of Qidxs, columns for 32 inputs
_CODEBOOKS = {
    "E8P12": ("e8p", "I16", 4),
    "E8P12RVQ4B": ("e8p-rvq4", "I32", 4),
    "E8P12RVQ3B": ("e8p-rvq3", "I32", 3),
    "D4": ("d4", "U8", 8),
    "HI": ("half-integer", "I32", 4),
}
_TWO_STAGES = ("e8p-rvq4", "e8p-rvq3")
# Which of eight weights each nibble of a word holds, from the lowest nibble on.
_NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)
# Odd parts of sizes for which the package has a Hadamard matrix, of order 4 times that.
_LARGEST_ODD = 63


class QuipForAll(Family):
    """See the file's description."""

    name = "QuIP-for-all"
    marker = "Qidxs"
    kinds = ("Qidxs", "SU", "SV", "Wscale", "had_left", "had_right", "weight")

    def check(self, parameters: Mapping[str, Any]) -> None:
        """See [`Family.check`]."""
        codebook = parameters.get("codebook")
        if not is_one_of(codebook, _CODEBOOKS):
            raise ValueError(
                f"The quantization_config of method 'QUiP' names codebook={codebook!r}; supported are "
                f"{', '.join(map(repr, _CODEBOOKS))}"
            )
        if is_true(parameters, "outlier_channel_split"):
            raise ValueError("The quantization_config of method 'QUiP' has outlier_channel_split, which is not supported")
        if parameters.get("lora_rank") not in (None, 0):
            raise ValueError(
                f"The quantization_config of method 'QUiP' has lora_rank={parameters['lora_rank']!r}: only 0 is supported"
            )
        _residual_scale(parameters)
        for key in ("use_rand", "merge_suv", "per_channel"):
            is_true(parameters, key)
        if is_true(parameters, "rescale_WH"):
            logger.warning(
                "This checkpoint was quantized with rescale_WH=true, which its package stores wrongly: it is decoded as it "
                "is stored, and is as bad as with that package"
            )

    def describe(self, source: Source, rows: int, columns: int, parameters: Mapping[str, Any]) -> Form:
        """See [`Family.describe`]."""
        codebook, dtype, words = _CODEBOOKS[parameters["codebook"]]
        merged = is_true(parameters, "merge_suv")
        for kind, size in (("SU", columns), ("SV", rows)):
            if kind in source.tensors or not merged:
                source.require(kind, FLOATING, (size,))
        if dense := source.shape("weight"):
            raise ValueError(f"{source.name} has both Qidxs and a weight of shape {list(dense)}")
        (name_in, padded_columns), (name_out, padded_rows) = (
            _transform(source, kind, size, parameters) for kind, size in (("had_left", columns), ("had_right", rows))
        )
        if padded_columns * words % 32:
            raise ValueError(
                f"{source.name} has {padded_columns} columns, which codebook {parameters['codebook']} cannot pack in words"
            )
        source.require("Qidxs", (dtype,), (padded_rows, padded_columns * words // 32))
        scales = source.require("Wscale", FLOATING)
        row_scales = len(scales) > 0 and math.prod(scales) > 1
        if row_scales:
            source.require("Wscale", FLOATING, (padded_rows,))
        if padded_rows > 1 and row_scales != is_true(parameters, "per_channel", default=row_scales):
            raise ValueError(
                f"{source.name}.Wscale has shape {list(scales)}, but the quantization_config says "
                f"per_channel={parameters['per_channel']}: {DAMAGED}"
            )
        padded = (padded_rows, padded_columns)
        return Form(
            rows,
            columns,
            codebook,
            (name_in, name_out),
            _residual_scale(parameters),
            Storage(None if padded == (rows, columns) else padded, row_scales, "float32"),
        )

    def repack(self, tensors: Mapping[str, torch.Tensor], form: Form) -> dict[str, torch.Tensor]:
        """See [`Family.repack`]."""
        rows, columns = form.padded
        words = tensors["Qidxs"]
        result = {}
        if form.codebook == "e8p":
            result["codes"] = lattice_bits.reorder_signs(words)
        elif form.codebook == "e8p-rvq4":
            halves = words.contiguous().view(torch.int16).view(rows, -1, 2)  # low half first: the second stage
            result["codes"] = lattice_bits.reorder_signs(halves[..., 1].contiguous())
            result["codes_residual"] = lattice_bits.reorder_signs(halves[..., 0].contiguous())
        elif form.codebook == "e8p-rvq3":
            triples = words.contiguous().view(torch.uint8).view(rows, -1, 3)
            codes = triples[..., 1:].contiguous().view(torch.int16)[..., 0]
            result["codes"] = lattice_bits.reorder_signs(codes.contiguous())
            result["codes_residual"] = triples[..., 0].contiguous()
        elif form.codebook == "d4":
            result["codes"] = words.contiguous()
        else:
            result["codes"] = lattice_bits.reorder_nibbles(words, _NIBBLES)
        scale = tensors["Wscale"].float()
        su, sv = (
            tensors[kind] if kind in tensors else torch.ones(size, device=words.device)
            for kind, size in (("SU", form.columns), ("SV", form.rows))
        )
        result["su"], result["sv"] = zeros_beyond(su, columns), zeros_beyond(sv, rows)
        if form.storage.row_scales:
            result["row_scales"] = scale
        else:
            result["sv"] = result["sv"] * scale.reshape(())
        for kind, name in (("had_left", "factor_in"), ("had_right", "factor_out")):
            if kind in tensors:
                result[name] = tensors[kind].float()
        return result


def _transform(source: Source, kind: str, size: int, parameters: Mapping[str, Any]) -> tuple[str, int]:
    """The native name of the transform of a side of this size, and its padded size."""
    odd = size // (size & -size)
    if kind in source.tensors:
        source.require(kind, FLOATING, (odd, odd))
        if not is_true(parameters, "use_rand", default=True):
            raise ValueError(f"{source.name}.{kind} exists, but the quantization_config says use_rand=false: {DAMAGED}")
        return STORED, size
    if odd == 1:
        return "hadamard", size
    # missing in files of the first weeks, when the factor was always random
    if is_true(parameters, "use_rand", default=True):
        source.require(kind, FLOATING)
    if size % 4 or odd > _LARGEST_ODD:
        return "hadamard", 1 << (size - 1).bit_length()
    return ("hadamard-quip-for-all" if 4 * odd in ORDERS else "hadamard"), size


def _residual_scale(parameters: Mapping[str, Any]) -> float | None:
    """The factor of the second stage. The package uses the config's number unchanged, even its default of −1."""
    codebook = _CODEBOOKS[parameters["codebook"]][0]
    scale = parameters.get("opt_resid_scale")
    if codebook not in _TWO_STAGES:
        return None
    if scale is None:
        return PUBLISHED_RESIDUAL_SCALES[codebook]
    if not is_finite_number(scale) or float(scale) == 0:
        raise ValueError(f"The quantization_config has opt_resid_scale={scale!r}, which must be a finite number, not 0")
    return float(scale)
