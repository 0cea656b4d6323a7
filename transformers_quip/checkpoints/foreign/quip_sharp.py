"""Checkpoints of QuIP# (Cornell-RelaxML/quip-sharp): E8P with two, three and four bits; D4 and half-integers in old ones.

The format was derived from the published package; `config.json` has a dict "quip_params". A linear is

    y = f ⊙ ( SV ⊙ Wscale ⊙ Q_m Ŵ Q_nᵀ ( SU ⊙ x / scaleWH ) )

with f the scale of each of the projections that are fused, so that natively su = SU / scaleWH and sv = f ⊙ SV · Wscale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from ...codebooks.residual import PUBLISHED_RESIDUAL_SCALES
from ...config.storage import Storage
from ..headers import DAMAGED
from . import lattice_bits
from .family import FLOATING, Family, Form, Source, is_finite_number, is_one_of, is_true

# Odd parts of the sizes for which the package has a Hadamard matrix, of order 4 times that.
_ODD_PARTS = (1, 3, 5, 7, 9, 13, 15, 27, 29, 31, 35, 39, 43)
# codebook_id → codebook, columns of Qidxs for 64 inputs, their type, version of the codebook
_CODEBOOKS = {
    7: ("e8p", 2, "I64", 1),
    17: ("e8p-rvq4", 4, "I64", 1),
    18: ("e8p-rvq3", 3, "I64", 0),
    0: ("d4", 16, "U8", 0),
    10: ("half-integer", 8, "I32", 0),
}
_NAMES = {"E8P12": 7, "E8P12RVQ4B": 17, "E8P12RVQ3B": 18, "D4": 0, "HI4B1C": 10}
_TWO_STAGES = ("e8p-rvq4", "e8p-rvq3")
# Which of eight weights each nibble of a word holds, from the lowest nibble on.
_NIBBLES = (7, 5, 3, 1, 6, 4, 2, 0)


class QuipSharp(Family):
    """See the file's description."""

    name = "QuIP#"
    marker = "Qidxs"
    kinds = ("Qidxs", "SU", "SV", "Wscale", "codebook_id", "fuse_scales", "scaleWH", "A", "B", "ocs_dupe_inds", "scale")
    fused = MappingProxyType({"qkv_proj": ("q_proj", "k_proj", "v_proj"), "upgate_proj": ("up_proj", "gate_proj")})

    def siblings(self, name: str) -> dict[str, str]:
        """Of January 2024: where projections are not fused, their scales are buffers of the module around them."""
        parent, _, last = name.rpartition(".")
        return {"scale": f"{parent}.{last.removesuffix('_proj')}_scale"} if last.endswith("_proj") else {}

    def check(self, parameters: Mapping[str, Any]) -> None:
        """See [`Family.check`]."""
        codebook: Any = parameters.get("codebook")
        version = parameters.get("codebook_version", 0)
        if not is_one_of(codebook, _NAMES):
            raise ValueError(
                f"quip_params names codebook={codebook!r}; of QuIP#, {', '.join(map(repr, _NAMES))} are supported"
            )
        known = _CODEBOOKS[_NAMES[codebook]]
        if version != known[3]:
            raise ValueError(
                f"quip_params names version {version!r} of codebook {codebook}; only version {known[3]} is supported "
                "(the E8P codes of version 0, before 2023-12-19, mean other weights)"
            )
        if parameters.get("model_version", 1) != 1:
            raise ValueError(f"quip_params has model_version={parameters['model_version']!r}; only 1 is supported")
        if parameters.get("lora_rank", 0) != 0:
            raise ValueError(
                f"quip_params has lora_rank={parameters['lora_rank']!r}: checkpoints with QuIP#'s low-rank term (before "
                "July 2024) are not supported"
            )
        for key in ("outlier_channel_split", "pack_out"):
            if is_true(parameters, key):
                raise ValueError(f"quip_params has {key}, which is not supported")
        for key in ("rescale_WH", "fused"):
            is_true(parameters, key)
        _residual_scale(parameters, "e8p-rvq4")

    def describe(self, source: Source, rows: int, columns: int, parameters: Mapping[str, Any]) -> Form:
        """See [`Family.describe`]."""
        for kind in ("A", "B", "ocs_dupe_inds"):
            if kind in source.tensors:
                raise ValueError(f"{source.name}.{kind}: low-rank terms and split channels of QuIP# are not supported")
        identity = source.number("codebook_id")
        if identity not in _CODEBOOKS:
            raise ValueError(
                f"{source.name}.codebook_id is {identity}; known are {', '.join(map(str, sorted(_CODEBOOKS)))}"
            )
        codebook, words, dtype, _ = _CODEBOOKS[identity]
        if dtype == "I64" and (rows % lattice_bits.TILE_ROWS or columns % lattice_bits.TILE_COLUMNS):
            raise ValueError(
                f"{source.name} is [{rows}, {columns}] in this model; QuIP# packs sizes that are multiples of "
                f"{lattice_bits.TILE_ROWS} and {lattice_bits.TILE_COLUMNS} only"
            )
        source.require("Qidxs", (dtype,), (rows, columns * words // 64))
        source.require("SU", FLOATING, (columns,))
        source.require("SV", FLOATING, (rows,))
        unfused = not is_true(parameters, "fused", default=True)
        for kind in ("Wscale", "scale") if unfused else ("Wscale",):
            shape = source.require(kind, FLOATING)
            if math.prod(shape) != 1:
                raise ValueError(f"{source.name}.{kind} has shape {list(shape)} instead of one number")
        parts = self.fused.get(source.name.rpartition(".")[2])
        if parts:
            source.require("fuse_scales", FLOATING, (len(parts),))
        rescaled = is_true(parameters, "rescale_WH")
        if rescaled:
            source.require("scaleWH", FLOATING, (columns,))
        for kind, said in (("scaleWH", rescaled), ("scale", unfused), ("fuse_scales", bool(parts))):
            if kind in source.tensors and not said:
                raise ValueError(
                    f"{source.keys[kind]} exists, which quip_params (rescale_WH={rescaled}, fused={not unfused}) rules "
                    f"out: {DAMAGED}"
                )
        check_hadamard(source.name, rows, columns)
        return Form(
            rows,
            columns,
            codebook,
            ("hadamard", "hadamard"),
            _residual_scale(parameters, codebook),
            Storage(scales_dtype="float32"),
            {"codebook_id": identity},
        )

    def repack(self, tensors: Mapping[str, torch.Tensor], form: Form) -> dict[str, torch.Tensor]:
        """See [`Family.repack`]."""
        rows, columns = form.rows, form.columns
        words = tensors["Qidxs"]
        result = {}
        if form.codebook in ("e8p", "e8p-rvq4", "e8p-rvq3"):
            base = words[:, : columns // 32]
            result["codes"] = lattice_bits.unpack_tiles(base, rows, columns)
            rest = words[:, columns // 32 :]
            if form.codebook == "e8p-rvq4":
                result["codes_residual"] = lattice_bits.unpack_tiles(rest, rows, columns)
            elif form.codebook == "e8p-rvq3":
                result["codes_residual"] = rest.contiguous().view(torch.uint8)
        elif form.codebook == "d4":
            result["codes"] = _unpermute(words)
        else:
            result["codes"] = lattice_bits.reorder_nibbles(words, _NIBBLES)
        su = tensors["SU"].float()
        if "scaleWH" in tensors:
            su = su / tensors["scaleWH"].float()
        sv = tensors["SV"].float()
        for kind in ("Wscale", "scale"):
            if kind in tensors:
                sv = sv * tensors[kind].float().reshape(())
        if "fuse_scales" in tensors:
            counts = torch.tensor(form.details["parts"], device=sv.device)
            sv = sv * tensors["fuse_scales"].float().repeat_interleave(counts)
        return {**result, "su": su, "sv": sv}


def check_hadamard(name: str, *sizes: int) -> None:
    """Raise `ValueError` for a size for which QuIP#, and QTIP after it, has no Hadamard matrix."""
    for size in sizes:
        if size // (size & -size) not in _ODD_PARTS or (size % 4 and size & (size - 1)):
            raise ValueError(f"{name} is {list(sizes)}: the package has no Hadamard matrix for size {size}")


def _unpermute(codes: torch.Tensor) -> torch.Tensor:
    """D4 codes as their package packed them: [m, g, 4] was written as [g, m, 4]."""
    rows, groups = codes.shape[0], codes.shape[1] // 4
    return codes.reshape(groups, rows, 4).transpose(0, 1).reshape(rows, -1)


def _residual_scale(parameters: Mapping[str, Any], codebook: str) -> float | None:
    """The factor of the second stage: QuIP# divides by a number that the config may override."""
    override = parameters.get("resid_scale_override", -1)
    if not is_finite_number(override):
        raise ValueError(f"quip_params has resid_scale_override={override!r}, which is not a finite number")
    if codebook not in _TWO_STAGES:
        return None
    return 1 / override if override > 0 else PUBLISHED_RESIDUAL_SCALES[codebook]
