"""E8P with a second stage that refines its error: 3 and 4 bits per weight (QuIP#, arXiv 2402.04396).

A point is p + r·q: p the nearest E8P point of x, q the nearest point of (x − p) / r in the second stage's codebook, and r
the residual scale. Each stage finds its nearest point, but the pair is chosen greedily: another pair may be nearer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch

from quip_kernels import cpu as cpu_kernels

from .base import PANEL, Codebook, Grid
from .e8 import E8
from .e8p import E8P
from .implementation import encoder


class Stage(NamedTuple):
    """The parameters of a residual codebook: its second stage and the scales.

    Attributes:
        codebook: of the second stage.
        gaussian_scale, residual_scale: see [`Codebook`].
    """

    codebook: Codebook
    gaussian_scale: float
    residual_scale: float


# At 3 bits, the scales are the published ones, which are the best for a Gaussian. At 4 bits, the published pair, 1.03 and
# 1 / 3.45, has a 16 % larger error than this one (`benchmarks/codebooks.py`).
STAGES = {
    "e8p-rvq3": Stage(E8(), 0.98, 1 / 2.04),
    "e8p-rvq4": Stage(E8P(), 0.90, 1 / 3.8),
}
# The residual scales of checkpoints of QuIP# and its successors that do not name one.
PUBLISHED_RESIDUAL_SCALES = {"e8p-rvq3": 1 / 2.04, "e8p-rvq4": 1 / 3.45}


# The stored codes of the second stage.
SECOND = "codes_residual"


class ResidualE8P(Codebook):
    """E8P and a second stage. Its name ends with "@" and the residual scale if that is not the one in `STAGES`.

    Args:
        name: "e8p-rvq3", whose second stage is E8 with one byte for 8 weights, or "e8p-rvq4", E8P again.
        residual_scale: factor of the second stage (the inverse of QuIP#'s number of that name); None: as in `STAGES`.
    """

    block_size = 8
    code_dtype = torch.int32
    kernels = "e8p"
    residual_scale: float

    def __init__(self, name: str, residual_scale: float | None = None):
        stage = STAGES[name]
        if residual_scale is not None and (not math.isfinite(residual_scale) or residual_scale == 0):
            raise ValueError(f"residual_scale={residual_scale} must be a finite number other than 0")
        self.residual_scale = stage.residual_scale if residual_scale is None else float(residual_scale)
        self.name = name if self.residual_scale == stage.residual_scale else f"{name}@{self.residual_scale!r}"
        self._stages = name
        self.first, self.second = E8P(), stage.codebook
        self.bits = self.first.bits + self.second.bits
        self.gaussian_scale = stage.gaussian_scale
        # A code is the code of the first stage, followed by this many bits of the second.
        self._shift = 8 * self.second.code_dtype.itemsize
        self._mask = (1 << self._shift) - 1

    def with_residual_scale(self, scale: float) -> Codebook:
        """See [`Codebook.with_residual_scale`]."""
        return ResidualE8P(self._stages, scale)

    def tensors(self, out_features: int, in_features: int) -> dict[str, Grid]:
        """See [`Codebook.tensors`]: the codes of each stage."""
        shape = self.codes_shape(out_features, in_features)
        return {"codes": Grid(shape, self.first.code_dtype), SECOND: Grid(shape, self.second.code_dtype)}

    def store(self, codes: torch.Tensor) -> dict[str, torch.Tensor]:
        """See [`Codebook.store`]."""
        second = (codes & self._mask).to(self.second.code_dtype)
        return {"codes": (codes >> self._shift).to(self.first.code_dtype), SECOND: second}

    def codes_of(self, tensors: Mapping[str, torch.Tensor], columns: int) -> torch.Tensor:
        """See [`Codebook.codes_of`]."""
        second = tensors[SECOND].to(torch.int32) & self._mask
        return (tensors["codes"].to(torch.int32) << self._shift) | second

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See [`Codebook.encode`]; exact in each stage."""
        rows = self.check_vectors(x)
        if encoder(rows.device) == "triton":
            from quip_kernels.gpu import nearest  # Triton is not installed everywhere

            codes, points = nearest.encode(rows.contiguous(), self.second.name, self.residual_scale)
            return codes.reshape(x.shape[:-1]), points.reshape(x.shape)
        if rows.device.type == "cpu" and cpu_kernels.is_available():
            codes, points = cpu_kernels.e8p_encode(rows.contiguous(), self.second.name, self.residual_scale)
            return codes.reshape(x.shape[:-1]), points.reshape(x.shape)
        first, points = self.first.encode(x)
        second, refinement = self.second.encode((x.float() - points) / self.residual_scale)
        codes = (first.to(torch.int32) << self._shift) | (second.to(torch.int32) & self._mask)
        return codes, points.add_(refinement, alpha=self.residual_scale)

    def round_panel(
        self, target: torch.Tensor, base: torch.Tensor, feedback: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See [`Codebook.round_panel`]; compiled where it can be."""
        if encoder(target.device) == "triton" and target.shape[1] <= PANEL:
            from quip_kernels.gpu import nearest

            panel = (target.contiguous(), base.contiguous(), feedback.contiguous())
            return nearest.round_panel(*panel, self.second.name, self.residual_scale)
        if target.device.type == "cpu" and cpu_kernels.is_available() and target.shape[1] <= cpu_kernels.MOST_COLUMNS:
            panel = (target.contiguous(), base.contiguous(), feedback.contiguous())
            return cpu_kernels.e8p_round_panel(*panel, self.second.name, self.residual_scale)
        return super().round_panel(target, base, feedback)

    def decode(self, tensors: Mapping[str, torch.Tensor], columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """See [`Codebook.decode`]. Computed in float64 for that dtype, else in float32 and rounded once."""
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        points = self.first.decode(tensors, columns, compute)
        second = self.second.decode({"codes": tensors[SECOND]}, columns, compute)
        return points.add_(second, alpha=self.residual_scale).to(dtype)
