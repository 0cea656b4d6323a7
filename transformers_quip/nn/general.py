"""A quantized linear with parts that the fused op does not support: padding, stored transforms, scales of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad

from ..incoherence import STORED, sides
from ..ops import Layer
from .linear import QuipLinear
from .stored import zeros


class GeneralLinear(QuipLinear):
    """y = sv ⊙ C_m Q_out( r ⊙ Ŵ · Q_inᵀ( C_nᵀ su ⊙ x ) ) + bias: [`QuipLinear`] for checkpoints that need more.

    C crops a vector to the real size and Cᵀ extends it by zeros; r are scales of the rows of Ŵ. The transform
    "stored" is F ⊗ S. F is an orthogonal matrix from the checkpoint, whose order is the odd part of the size, and S is
    Sylvester's matrix. If the odd part is 1, F is left out, and the transform is the Hadamard transform.

    Args:
        in_features, out_features, bias, options: see [`QuipLinear`].
        padded: (m', n'), the sizes of Ŵ; None: not padded.
        row_scales: whether it has r.

    Parameters: as [`QuipLinear`]'s for a linear of m' outputs and n' inputs, but the bias has m entries; and
        row_scales: [m'] or None. factor_in, factor_out: [o, o], o the odd part of n' or m', or None.
    """

    row_scales: nn.Parameter | None
    factor_in: nn.Parameter | None
    factor_out: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        incoherence: str | Sequence[str] = "hadamard",
        padded: tuple[int, int] | None = None,
        row_scales: bool = False,
        **options: Any,
    ):
        rows, columns = padded or (out_features, in_features)
        if rows < out_features or columns < in_features:
            raise ValueError(f"padded={[rows, columns]} is smaller than the linear, [{out_features}, {in_features}]")
        names = sides(incoherence)
        known = tuple("hadamard" if name == STORED else name for name in names)
        super().__init__(columns, rows, False, incoherence=known, **options)
        self.in_features, self.out_features = in_features, out_features
        self.incoherence_in, self.incoherence_out = names

        device, scales_dtype = self.su.device, self.su.dtype
        self.register_parameter("bias", zeros((out_features,), self.weight_dtype, device) if bias else None)
        self.register_parameter("row_scales", zeros((rows,), scales_dtype, device) if row_scales else None)
        for side, name, size in (("in", names[0], columns), ("out", names[1], rows)):
            order = odd_part(size) if name == STORED else 1
            factor = zeros((order, order), scales_dtype, device) if order > 1 else None
            self.register_parameter(f"factor_{side}", factor)
        self._names = known

    @property
    def packed_bytes(self) -> int:
        """See [`QuipLinear.packed_bytes`]; with the scales of the rows and the stored factors."""
        others = (self.row_scales, self.factor_in, self.factor_out)
        return super().packed_bytes + sum(t.numel() * t.element_size() for t in others if t is not None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Floating point [..., n] → [..., m] in the same dtype. Raises `ValueError` for any other input."""
        if x.shape[-1:] != (self.in_features,) or not x.is_floating_point():
            raise ValueError(f"expected floating point [..., {self.in_features}], got {x.dtype} {list(x.shape)} in {self}")
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        columns, rows = self.su.shape[0], self.sv.shape[0]
        t = pad(x.to(dtype), (0, columns - self.in_features))
        su: torch.Tensor = self.su
        name_in = self._names[0]
        if self.factor_in is not None:
            t = self._apply_factor(t * su.to(dtype), self.factor_in, transpose=True)
            su, name_in = torch.ones_like(su), "none"
        if self.row_scales is None and self.factor_out is None:
            y = self._codes(t, su, self.sv, name_in, self._names[1])
        else:
            inner = torch.ones_like(self.sv) if self.row_scales is None else self.row_scales
            y = self._codes(t, su, inner, name_in, "none")
            if self.factor_out is None:
                y = torch.ops.quip.transform(y, self._names[1], self.seed, False)
            else:
                y = self._apply_factor(y, self.factor_out, transpose=False)
            y = y * self.sv.to(dtype)
        y = y[..., : self.out_features] if rows > self.out_features else y
        return (y if self.bias is None else y + self.bias.to(dtype)).to(x.dtype)

    def _codes(self, x: torch.Tensor, su: torch.Tensor, sv: torch.Tensor, name_in: str, name_out: str) -> torch.Tensor:
        """sv ⊙ Q_out( Ŵ · Q_inᵀ( su ⊙ x ) ) with these vectors and transforms, of the padded sizes."""
        layer = Layer(self.weight_tensors(), su, sv, None, self.codebook, name_in, name_out, self.seed)
        return torch.ops.quip.linear(x, *layer)

    def _apply_factor(self, x: torch.Tensor, factor: torch.Tensor, transpose: bool) -> torch.Tensor:
        """(F ⊗ S) x, or its transpose, for every vector along the last dimension."""
        order = factor.shape[0]
        x = x.reshape(*x.shape[:-1], order, -1)
        x = torch.ops.quip.transform(x, "hadamard", self.seed, transpose)
        factor = factor.to(x.dtype)
        return ((factor.T if transpose else factor) @ x).flatten(-2)

    @torch.no_grad()
    def _weight_of(self, points: torch.Tensor) -> torch.Tensor:
        """See [`QuipLinear._weight_of`]; for the points of the larger matrix if this is a part of one."""
        compute = points.dtype
        weight = points if self.row_scales is None else points * self.row_scales.to(compute)[:, None]
        weight = self._rotate(weight, "in")[:, : self.in_features] * self.su.to(compute)[: self.in_features]
        weight = self._rotate(weight.T.contiguous(), "out").T[: self.out_features]
        return weight * self.sv.to(compute)[: self.out_features, None]

    def _rotate(self, rows: torch.Tensor, side: str) -> torch.Tensor:
        """Q_in or Q_out times every row."""
        factor = getattr(self, f"factor_{side}")
        if factor is not None:
            return self._apply_factor(rows, factor, transpose=False)
        return torch.ops.quip.transform(rows, self._names[side == "out"], self.seed, False)


def odd_part(size: int) -> int:
    """The largest odd divisor."""
    while size % 2 == 0:
        size //= 2
    return size
