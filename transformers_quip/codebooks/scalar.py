"""Uniform grids: each weight is rounded alone, to one of 2^b equally spaced values around zero (QuIP, arXiv 2307.13304)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from quip_kernels import cpu as cpu_kernels

from .base import PANEL, Codebook, Grid
from .implementation import encoder

# QuIP's grid ends at this multiple of the rms of the weights, for any number of bits (its section 4 and supplement).
QUIP_RANGE = 2.4
# Steps of the best uniform quantizer of a unit Gaussian, found by `benchmarks/codebooks.py`; up to 4 bits they are
# the steps of Max (Quantizing for minimum distortion, IRE Trans. Inf. Theory 6, 1960).
GAUSSIAN_STEPS = {2: 0.9957, 3: 0.5860, 4: 0.3352, 8: 0.03076}

# Columns that are rounded before their errors are passed on to the rest of a panel by one matrix product.
_STRIP = 16


class Scalar(Codebook):
    """The points k − (2^b − 1)/2 for k = 0 … 2^b − 1, which are half-integers.

    Stored without unused bits: bit j of weight i is bit b·i + j of its row, counted from the lowest bit of the first
    byte, and a row is completed to whole bytes.

    Args:
        bits: 2, 3, 4 or 8.
        name: by default "scalar" with the bits.
        gaussian_scale: by default the one with the least error on a Gaussian.
    """

    block_size = 1
    code_dtype = torch.uint8

    def __init__(self, bits: int, name: str | None = None, gaussian_scale: float | None = None):
        self.name = name or f"scalar{bits}"
        self.bits = float(bits)
        self.gaussian_scale = gaussian_scale or 1 / GAUSSIAN_STEPS[bits]
        self._bits = bits
        self._largest = (1 << bits) - 1
        # With feedback from other columns a wider grid can be better than the best for the weights alone: QuIP's is tried.
        quip = self._largest / (2 * QUIP_RANGE) / self.gaussian_scale
        self.scale_factors = tuple(sorted({*Codebook.scale_factors, round(quip, 4)}))

    def tensors(self, out_features: int, in_features: int) -> dict[str, Grid]:
        """See [`Codebook.tensors`]."""
        return {"codes": Grid((out_features, self._row_bytes(in_features)), torch.uint8)}

    @property
    def columns_together(self) -> int:
        """See [`Codebook.columns_together`]: weights that fill whole bytes."""
        return self._group()[0]

    def store(self, codes: torch.Tensor) -> dict[str, torch.Tensor]:
        """See [`Codebook.store`]."""
        weights, count = self._group()
        rows, columns = codes.shape
        codes = torch.nn.functional.pad(codes, (0, -columns % weights)).reshape(rows, -1, weights)
        word = torch.zeros(codes.shape[:2], dtype=torch.int32, device=codes.device)
        for i in range(weights):
            word |= codes[..., i].to(torch.int32) << (self._bits * i)
        stored = torch.stack([(word >> (8 * i)) & 0xFF for i in range(count)], dim=2).to(torch.uint8)
        return {"codes": stored.reshape(rows, -1)[:, : self._row_bytes(columns)].contiguous()}

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See [`Codebook.encode`]; exact."""
        codes = (self.check_vectors(x) + self._largest / 2).round_().clamp_(0, self._largest)
        return codes.to(torch.uint8).reshape(x.shape[:-1]), codes.sub_(self._largest / 2).reshape(x.shape)

    def round_panel(
        self, target: torch.Tensor, base: torch.Tensor, feedback: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See [`Codebook.round_panel`]; compiled if possible, else in PyTorch with columns as rows of memory."""
        if encoder(target.device) == "triton" and target.shape[1] <= PANEL:
            from quip_kernels.gpu import nearest  # Triton is not installed everywhere

            panel = (target.contiguous(), base.contiguous(), feedback.contiguous())
            return nearest.round_scalar_panel(*panel, self._largest)
        if target.device.type == "cpu" and cpu_kernels.is_available() and target.shape[1] <= cpu_kernels.MOST_COLUMNS:
            panel = (target.contiguous(), base.contiguous(), feedback.contiguous())
            return cpu_kernels.scalar_round_panel(*panel, self._largest)
        half = self._largest / 2
        wanted, base = target.T.clone(memory_format=torch.contiguous_format), base.T.contiguous()
        points, delta = torch.empty_like(wanted), torch.empty_like(wanted)
        for end in range(len(wanted), 0, -_STRIP):
            begin = max(end - _STRIP, 0)
            for k in reversed(range(begin, end)):
                torch.add(wanted[k], half, out=points[k]).round_().clamp_(0, self._largest).sub_(half)
                torch.sub(base[k], points[k], out=delta[k])
                wanted[begin:k].addr_(feedback[k, begin:k], delta[k])
            wanted[:begin].addmm_(feedback[begin:end, :begin].T, delta[begin:end])
        codes = (points + half).to(torch.uint8)
        return codes.T.contiguous(), points.T.contiguous(), delta.T.contiguous()

    def decode(self, tensors: Mapping[str, torch.Tensor], columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """See [`Codebook.decode`]. The values are exact in float16, and to 7 bits in bfloat16."""
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        return (self.codes_of(tensors, columns).to(compute) - self._largest / 2).to(dtype)

    def codes_of(self, tensors: Mapping[str, torch.Tensor], columns: int) -> torch.Tensor:
        """See [`Codebook.codes_of`]: uint8 [m, n]."""
        codes = tensors["codes"]
        weights, count = self._group()
        rows = codes.shape[0]
        codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % count)).reshape(rows, -1, count)
        word = torch.zeros(codes.shape[:2], dtype=torch.int32, device=codes.device)
        for i in range(count):
            word |= codes[..., i].to(torch.int32) << (8 * i)
        values = torch.stack([(word >> (self._bits * i)) & self._largest for i in range(weights)], dim=2)
        return values.to(torch.uint8).reshape(rows, -1)[:, :columns]

    def _row_bytes(self, columns: int) -> int:
        return math.ceil(columns * self._bits / 8)

    def _group(self) -> tuple[int, int]:
        """The smallest number of weights that fills whole bytes, and the number of bytes."""
        common = math.lcm(self._bits, 8)
        return common // self._bits, common // 8
