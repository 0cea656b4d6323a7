"""QuipLinear: a linear layer whose weight is codes between two incoherence transforms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import codebooks
from .. import ops as _ops
from ..incoherence import sides
from ..ops import packing
from .stand_in import PackedWeight

if TYPE_CHECKING:
    from .shared import SharedInput


class QuipLinear(nn.Linear):
    """y = sv ⊙ Q_out( Ŵ · Q_inᵀ( su ⊙ x ) ) + bias, Ŵ = codebook.decode(codes) (QuIP#, arXiv 2402.04396).

    It is an `nn.Linear` so that tools which look for those (PEFT) find it, but it has no weight parameter: `weight` is
    a read-only stand-in with the shape, dtype and device of the dense weight. All parameters are frozen; there are no
    buffers. A new module computes zero until its parameters are loaded.

    Where Triton kernels compute it, its codes are brought into their layout ([`pack`]), in the place of the logical one.
    Whatever leaves the module (state_dict, copies, pickles) and what leaves the GPU is in the logical layout again.

    Args:
        in_features, out_features: n and m, any positive sizes.
        bias: whether there is one.
        codebook: its name. incoherence: name of the transform on both sides, or a pair of names (input side, output
            side). seed: of the transforms' random part.
        residual_scale: what multiplies the codebook's second stage; None: the codebook's own.
        conv1d: whether it stands for a `transformers.pytorch_utils.Conv1D` (what [`dequantize`] gives back does not
            depend on it; `nn.replace` does).
        device, dtype: of the parameters, the dtype of the floating ones and of the stand-in for the weight.
        scales_dtype: of su, sv and the table; None: dtype.

    Parameters:
        codes, codes_residual: integers, m rows, as the codebook's `layout` describes them; the second is None for a
            codebook of one stage.
        table: of the codebook's `table_shape`, for a codebook that has a table in the checkpoint, else None.
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
        residual_scale: float | None = None,
        conv1d: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        scales_dtype: torch.dtype | None = None,
    ):
        nn.Module.__init__(self)  # nn.Linear's own would allocate the dense weight
        if in_features < 1 or out_features < 1:
            raise ValueError(f"in_features={in_features} and out_features={out_features} must be positive")
        book = codebooks.get(codebook, residual_scale)
        grids = book.layout(out_features, in_features)
        self.in_features, self.out_features = in_features, out_features
        self.codebook, self.seed, self.conv1d = codebook, seed, conv1d
        self.incoherence_in, self.incoherence_out = sides(incoherence)
        self.residual_scale = residual_scale

        def codes(grid: codebooks.Grid) -> nn.Parameter:
            return nn.Parameter(torch.zeros(grid.shape, dtype=grid.dtype, device=device), requires_grad=False)

        def vector(size: int, dtype: torch.dtype | None) -> nn.Parameter:
            return nn.Parameter(torch.zeros(size, dtype=dtype, device=device), requires_grad=False)

        self.codes = codes(grids[0])
        self.register_parameter("codes_residual", codes(grids[1]) if len(grids) > 1 else None)
        scales_dtype = scales_dtype or dtype
        table = None if book.table_shape is None else torch.zeros(book.table_shape, dtype=scales_dtype, device=device)
        self.register_parameter("table", None if table is None else nn.Parameter(table, requires_grad=False))
        self.su = vector(in_features, scales_dtype)
        self.sv = vector(out_features, scales_dtype)
        self.register_parameter("bias", vector(out_features, dtype) if bias else None)
        self.weight_dtype = dtype or torch.get_default_dtype()
        self.share_input(None)
        self._prepared: _ops.prepared.Prepared | None = None
        # Transformers' weight initialisation leaves such a module alone.
        self._is_hf_initialized = True

    @classmethod
    def from_quantized(cls, linear: nn.Module, quantized: Any, config: Any) -> QuipLinear:
        """The module that replaces `linear`.

        Args:
            linear: the dense `nn.Linear` or `Conv1D`; its bias, and its weight's dtype and device are used.
            quantized: has `codes`, `su` [n] and `sv` [m] (`quantize.layer.QuantizedWeight`), and `codes_residual` for
                a codebook of two stages.
            config: has `codebook`, `residual_scale`, `incoherence` and `seed` ([`QuipConfig`]).

        Raises:
            ValueError: the tensors do not have the shapes of that linear.
        """
        conv1d = not isinstance(linear, nn.Linear)
        out_features, in_features = reversed(linear.weight.shape) if conv1d else linear.weight.shape
        module = cls(
            in_features,
            out_features,
            linear.bias is not None,
            codebook=config.codebook,
            incoherence=config.incoherence,
            seed=config.seed,
            residual_scale=config.residual_scale,
            conv1d=conv1d,
            device="meta",
            dtype=linear.weight.dtype,
        )
        for name in ("codes", "codes_residual", "su", "sv"):
            expected, given = getattr(module, name), getattr(quantized, name, None)
            if (expected is None) != (given is None) or (given is not None and given.shape != expected.shape):
                raise ValueError(
                    f"{name} of a [{out_features}, {in_features}] linear must be "
                    f"{None if expected is None else list(expected.shape)}, got "
                    f"{None if given is None else list(given.shape)}"
                )
            if given is not None:
                # Always a copy: linears that read one input are given one su, and safetensors saves no shared tensors.
                value = torch.empty(expected.shape, dtype=expected.dtype, device=linear.weight.device).copy_(given)
                setattr(module, name, nn.Parameter(value, requires_grad=False))
        if linear.bias is not None:
            module.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        return module.train(linear.training)

    @property
    def weight(self) -> PackedWeight:
        """A stand-in with the shape [m, n], dtype and device of the dense weight; see [`PackedWeight`]."""
        return PackedWeight.like(self.su, self.out_features, self.in_features, self.weight_dtype)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise AttributeError(
                "the weight of a quantized linear cannot be set: it is stored as codes. Call model.dequantize() "
                "first, or replace the module by an nn.Linear"
            )
        super().__setattr__(name, value)

    def reset_parameters(self) -> None:
        """Quantized weights have no random start; nothing calls this but code that means a dense linear."""
        raise TypeError("a quantized linear cannot be initialised at random: load or quantize a weight")

    @property
    def packed_bytes(self) -> int:
        """Bytes of all tensors that stand for the weight: codes of all stages, table, su and sv (not the bias)."""
        codes = [tensor for tensor in (self.codes, self.codes_residual) if tensor is not None]
        others = [tensor for tensor in (self.table, self.su, self.sv) if tensor is not None]
        return sum(packing.stored_bytes(tensor, self.codebook, self.in_features) for tensor in codes) + sum(
            tensor.numel() * tensor.element_size() for tensor in others
        )

    @property
    def true_bits(self) -> float:
        """Bits per weight, with everything that is stored for it: packed_bytes · 8 / (m·n)."""
        return self.packed_bytes * 8 / (self.out_features * self.in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Floating point [..., n] → [..., m] in the same dtype. Raises `ValueError` for any other input."""
        if x.shape[-1:] != (self.in_features,) or not x.is_floating_point():
            raise ValueError(f"expected floating point [..., {self.in_features}], got {x.dtype} {list(x.shape)} in {self}")
        tensors = self._parameters  # asking the module for each of them takes five times as long
        if not torch.compiler.is_compiling() and self._prepared is not None:
            y = self._prepared(x, tensors)
            if y is not None:
                return y
        if not tensors["codes"].is_cpu and not torch.compiler.is_compiling():
            self.pack_if_wanted()
        arguments = (x, *(tensors[name] for name in _ops.prepared.TENSORS))
        names = (self.codebook, self.incoherence_in, self.incoherence_out, self.seed)
        arguments += (*names, self.residual_scale, tensors["table"])
        if torch.is_grad_enabled():
            return torch.ops.quip.linear(*arguments)
        if self._shared is not None and self._shares_now(x):
            rotated = self._shared.take(self, x)
            names = (self.codebook, self.incoherence_out, self.seed, self.residual_scale)
            parts = (tensors[name] for name in ("codes", "codes_residual", "sv", "bias"))
            return torch.ops.quip.rotated_linear(x, rotated, *parts, *names, tensors["table"])
        if torch.compiler.is_compiling():
            return torch.ops.quip.linear(*arguments)
        y = _ops.prepared.linear(*arguments)
        self._prepared = _ops.prepared.prepare(x, tensors, *names, self.residual_scale) or self._prepared
        return y

    def rotate(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The first step of the forward, Q_inᵀ( su ⊙ x ), as the second step takes it (see `ops.schemas`)."""
        activations = _ops.backend.get_activations()
        return torch.ops.quip.rotate(x, self.su, self.codebook, self.incoherence_in, self.seed, activations)

    def share_input(self, shared: SharedInput | None) -> None:
        """Take the transformed input from there, where kernels compute this on a GPU, as long as su stays as it is."""
        self._shared = shared
        self._su_version = None if shared is None or self.su.is_inference() else (self.su, self.su._version)

    def _shares_now(self, x: torch.Tensor) -> bool:
        """Whether the first step is computed apart; without gradients, which only the whole op has."""
        if not packing.is_run_by_kernels(self.codes) or x.device != self.codes.device or x.numel() == 0:
            return False
        return torch.compiler.is_compiling() or self._drop_share_if_changed() is not None

    def _drop_share_if_changed(self) -> SharedInput | None:
        """The shared input; None from now on if su is not what it was."""
        known = self._su_version
        if known is None or known[0] is not self._parameters["su"] or known[1] != known[0]._version:
            self.share_input(None)
        return self._shared

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The dense weight diag(sv) Q_out Ŵ Q_inᵀ diag(su).

        Args:
            dtype: of the result; None: that of the stand-in `weight`.

        Returns:
            [m, n], so that F.linear(x, weight, bias) is what the module computes.
        """
        dtype = dtype or self.weight_dtype
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        weight = self._decode(self.in_features, compute)
        # Rows first: (Ŵ Q_inᵀ) is Q_in applied to every row of Ŵ; then Q_out to every column.
        weight = torch.ops.quip.transform(weight, self.incoherence_in, self.seed, False) * self.su.to(compute)
        weight = torch.ops.quip.transform(weight.T.contiguous(), self.incoherence_out, self.seed, False).T
        return (weight * self.sv.to(compute)[:, None]).to(dtype).contiguous()

    def _decode(self, columns: int, dtype: torch.dtype) -> torch.Tensor:
        """Ŵ."""
        return torch.ops.quip.decode(
            self.codes, self.codes_residual, self.codebook, columns, dtype, self.residual_scale, self.table
        )

    @property
    def is_packed(self) -> bool:
        """Whether the codes are in the layout of the Triton kernels."""
        return packing.is_packed(self.codes, self.codebook)

    def pack(self) -> None:
        """Bring the codes into the layout of the Triton kernels, if they are not. Raises `TypeError` if it has none."""
        if not self.is_packed:
            self._set_codes(*packing.pack(self.codes, self.codes_residual))

    def unpack(self) -> None:
        """Bring the codes into the logical layout, if they are not."""
        self._set_codes(*self._logical_codes())

    def pack_if_wanted(self) -> None:
        """[`pack`] if Triton kernels are going to compute this module; not where hooks bring and take its codes."""
        if packing.is_wanted(self.codes, self.codebook) and not self._is_offloaded():
            self.pack()

    def _is_offloaded(self) -> bool:
        hook = getattr(self, "_hf_hook", None)  # of accelerate; several are held together by one that has `hooks`
        return any(getattr(part, "offload", False) for part in getattr(hook, "hooks", (hook,)))

    def _logical_codes(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        return packing.logical(self.codes, self.codes_residual, self.codebook, self.in_features)

    def _set_codes(self, codes: torch.Tensor, codes_residual: torch.Tensor | None) -> None:
        for name, value in (("codes", codes), ("codes_residual", codes_residual)):
            if value is not self._parameters[name]:
                self._parameters[name] = nn.Parameter(value, requires_grad=False)

    def _apply(self, fn: Callable, recurse: bool = True) -> QuipLinear:
        shared = self._drop_share_if_changed()
        super()._apply(fn, recurse)
        # a change of dtype (`module.to`, `.bfloat16()`) is one of the stand-in for the weight too
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype, device="cpu")).dtype
        if self.is_packed and self.codes.device.type not in packing.DEVICES:
            self.unpack()
        self.share_input(shared)  # every su is changed alike
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.is_packed:
            for name, value in zip(("codes", "codes_residual"), self._logical_codes(), strict=True):
                if value is not None:
                    destination[prefix + name] = nn.Parameter(value, requires_grad=False) if keep_vars else value

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        if prefix + "codes" in state_dict:
            self.unpack()
        self.share_input(None)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__ | {"_prepared": None}
        if self.is_packed:
            codes = zip(("codes", "codes_residual"), self._logical_codes(), strict=True)
            logical = {name: value if value is None else nn.Parameter(value, requires_grad=False) for name, value in codes}
            state["_parameters"] = self._parameters | logical
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.share_input(state.get("_shared"))

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"codebook={self.codebook}, bits={self.true_bits:.3f}"
        )
