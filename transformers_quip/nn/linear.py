"""QuipLinear: a linear layer whose weight is codes between two incoherence transforms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .. import ops as _ops
from ..incoherence import sides
from ..ops import Layer, packing
from .packing import PackedCodes
from .stand_in import PackedWeight
from .stored import zeros


class QuipLinear(PackedCodes, nn.Linear):
    """y = sv ⊙ Q_out( Ŵ · Q_inᵀ( su ⊙ x ) ) + bias, Ŵ = codebook.decode(tensors) (QuIP#, arXiv 2402.04396).

    It is an `nn.Linear` so that tools which look for those (PEFT) find it, but it has no weight parameter: `weight` is
    a read-only stand-in with the shape, dtype and device of the dense weight. All parameters are frozen; it has no
    buffers. A new module computes zero until its parameters are loaded.

    Where its device computes another form of the codes faster, that form replaces the stored one ([`pack_if_wanted`]).

    Args:
        in_features, out_features: n and m, any positive sizes.
        bias: whether it has one.
        codebook: its name, with its residual scale if that is not its own (`codebooks.spec`).
        incoherence: name of the transform on both sides, or a pair of names (input side, output side).
        seed: of the transforms' random part.
        conv1d: whether it replaces a `transformers.pytorch_utils.Conv1D` (the result of [`dequantize`] does not depend
            on it; `nn.replace` does).
        device, dtype: of the parameters, the dtype of the floating ones and of the stand-in for the weight.
        scales_dtype: of su, sv and the codebook's floating-point tensors; None: dtype.

    Parameters:
        codes, …: the tensors that `Codebook.tensors` names (`tensor_names`).
        su: [n]. sv: [m]. bias: [m] or None.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        codebook: str = "e8p",
        incoherence: str | Sequence[str] = "hadamard",
        seed: int = 0,
        conv1d: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        scales_dtype: torch.dtype | None = None,
    ):
        nn.Module.__init__(self)  # nn.Linear's own would allocate the dense weight
        if in_features < 1 or out_features < 1:
            raise ValueError(f"in_features={in_features} and out_features={out_features} must be positive")
        self.in_features, self.out_features = in_features, out_features
        self.codebook, self.seed, self.conv1d = codebook, seed, conv1d
        self.incoherence_in, self.incoherence_out = sides(incoherence)
        self._add_empty(out_features, in_features, device, scales_dtype or dtype)
        self.register_parameter("bias", zeros((out_features,), dtype, device) if bias else None)
        self.weight_dtype = dtype or torch.get_default_dtype()
        self._prepared: _ops.prepared.Prepared | None = None
        # Transformers' weight initialisation leaves such a module alone.
        self._is_hf_initialized = True

    @property
    def weight(self) -> PackedWeight:  # type: ignore[override] # on purpose: a linear without a dense weight
        """A stand-in with the shape [m, n], dtype and device of the dense weight; see [`PackedWeight`]."""
        return PackedWeight.like(self.su, self.out_features, self.in_features, self.weight_dtype)

    @property
    def W_q(self) -> PackedWeight:
        """The stand-in under HQQ's name: PEFT calls `dequantize()` of a linear that has it (DoRA's norm of the weight)."""
        return self.weight

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise AttributeError(
                "the weight of a quantized linear cannot be set: it is stored as codes. Call model.dequantize() "
                "first, or replace the module by an nn.Linear"
            )
        super().__setattr__(name, value)

    def reset_parameters(self) -> None:
        """Quantized weights have no random initialisation; only code for dense linears calls this."""
        raise TypeError("a quantized linear cannot be initialised at random: load or quantize a weight")

    @property
    def packed_bytes(self) -> int:
        """Bytes of all tensors of the weight: the codebook's, su and sv (not the bias)."""
        scales = self.su.numel() * self.su.element_size() + self.sv.numel() * self.sv.element_size()
        return packing.stored_bytes(self.weight_tensors(), self.codebook, self.su.shape[0]) + scales

    @property
    def true_bits(self) -> float:
        """Bits per weight, counting all stored tensors: packed_bytes · 8 / (m·n)."""
        return self.packed_bytes * 8 / (self.out_features * self.in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Floating point [..., n] → [..., m] in the same dtype. Raises `ValueError` for any other input."""
        if x.shape[-1:] != (self.in_features,) or not x.is_floating_point():
            raise ValueError(f"expected floating point [..., {self.in_features}], got {x.dtype} {list(x.shape)} in {self}")
        if torch.compiler.is_compiling():
            return torch.ops.quip.linear(x, *self.layer())
        if self._prepared is not None:
            # `_parameters`, because asking the module for each of them takes five times as long
            y = self._prepared(x, self._parameters)
            if y is not None:
                return y
        return self._look_up(x)

    def _look_up(self, x: torch.Tensor) -> torch.Tensor:
        """The output; it also prepares the next call of this kind, if possible."""
        self.pack_if_wanted()
        layer = self.layer()
        if torch.is_grad_enabled() and _ops.prepared.needs_graph(x, self._parameters.values()):
            return torch.ops.quip.linear(x, *layer)
        y = _ops.prepared.linear(x, layer)
        self._prepared = _ops.prepared.prepare(x, self._parameters, self.tensor_names, layer) or self._prepared
        return y

    def layer(self) -> Layer:
        """The module's tensors and names, as arguments of the ops."""
        tensors: dict[str, Any] = self._parameters  # only the bias may be None
        weight = [tensors[name] for name in self.tensor_names]
        names = (self.codebook, self.incoherence_in, self.incoherence_out, self.seed)
        return Layer(weight, tensors["su"], tensors["sv"], tensors["bias"], *names)

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The dense weight diag(sv) Q_out Ŵ Q_inᵀ diag(su).

        Args:
            dtype: of the result; None: the dtype of the stand-in `weight`.

        Returns:
            [m, n], so that F.linear(x, weight, bias) equals the output of the module.
        """
        dtype = dtype or self.weight_dtype
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        return self._weight_of(self._decode(compute)).to(dtype).contiguous()

    @torch.no_grad()
    def _weight_of(self, points: torch.Tensor) -> torch.Tensor:
        """diag(sv) Q_out Ŵ Q_inᵀ diag(su) for Ŵ = points."""
        # Rows first: (Ŵ Q_inᵀ) is Q_in applied to every row of Ŵ; then Q_out to every column.
        weight = torch.ops.quip.transform(points, self.incoherence_in, self.seed, False) * self.su.to(points.dtype)
        weight = torch.ops.quip.transform(weight.T.contiguous(), self.incoherence_out, self.seed, False).T
        return weight * self.sv.to(points.dtype)[:, None]

    def _decode(self, dtype: torch.dtype) -> torch.Tensor:
        """Ŵ."""
        return torch.ops.quip.decode(self.weight_tensors(), self.codebook, self.sv.shape[0], self.su.shape[0], dtype)

    def _apply(self, fn: Callable, recurse: bool = True) -> QuipLinear:
        # a change of dtype (`module.to`, `.bfloat16()`) is one of the stand-in for the weight too
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype, device="cpu")).dtype
        super()._apply(fn, recurse)
        self._unpack_off_the_gpu()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_prepared": None}

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"codebook={self.codebook}, bits={self.true_bits:.3f}"
        )
