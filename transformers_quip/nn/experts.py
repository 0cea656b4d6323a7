"""QuipExperts: the experts of a mixture, whose weights are codes that are stacked like the dense weights were."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .. import codebooks
from .. import ops as _ops  # noqa: F401 - registers torch.ops.quip
from ..incoherence import STORED, sides
from ..ops import Layer
from .empty import check_transforms
from .stacked_forward import StackedForward
from .stacks import Stack, find_stacks
from .stored import zeros


@dataclass(frozen=True)
class Form:
    """How the weights of one projection are stored.

    Attributes:
        codebook: as `codebooks.get` takes it.
        incoherence_in, incoherence_out, seed: of the transforms.
        tensors: the names of the codebook's tensors, in its order.
    """

    codebook: str
    incoherence_in: str
    incoherence_out: str
    seed: int
    tensors: tuple[str, ...]


class QuipExperts(StackedForward):
    """The experts of a mixture with quantized projections: E_i(x) = down_i( gate( gate_up_i x ) ), for example.

    Each expert's matrix is quantized as that of a [`QuipLinear`], and its tensors are stacked on dimension 0, as
    parameters of this module: `down_proj_codes` [experts, …], `down_proj_su` [experts, columns], `down_proj_sv` [experts,
    rows]. So expert parallelism shards them like the dense weights. Only the experts that tokens chose are decoded.

    The module that it replaces says how the experts are computed ([`StackedForward`]). Biases, norms and other
    parameters are that module's own. A new module computes zero until its parameters are loaded.

    Args:
        module: Transformers' module of experts (`stacks.find_stacks`); its weights' dtype is used for su and sv.
        config: has `for_module` ([`QuipConfig`]).
        name: of the module in its model, for the config and for errors.

    Raises:
        ValueError: the module is not a stack of experts, or the codebook or the transforms do not fit one.
    """

    def __init__(self, module: Any, config: Any, name: str):
        if not find_stacks(module):
            raise ValueError(f"{name} ({type(module).__name__}) is not a module of stacked experts")
        super().__init__(module)
        self.forms: dict[str, Form] = {}
        for stack in self.stacks.values():
            self.forms[stack.name] = self._add(stack, config.for_module(f"{name}.{stack.name}"), f"{name}.{stack.name}")

    def _add(self, stack: Stack, options: Any, name: str) -> Form:
        """Register the parameters of a projection, on the meta device."""
        grids = stacked_grids(stack, options.codebook_spec, name)
        inner, outer = sides(options.incoherence)
        if STORED in (inner, outer):
            raise ValueError(f"{name}: the transform {STORED!r} is not available for experts")
        check_transforms(name, options.incoherence, stack.rows, stack.columns)
        dtype = self._bare[0].get_parameter(stack.name).dtype
        for key, grid in grids.items():
            shape = (stack.experts, *grid.empty_shape())
            self.register_parameter(f"{stack.name}_{key}", zeros(shape, grid.dtype_in(dtype), "meta"))
        self.register_parameter(f"{stack.name}_su", zeros((stack.experts, stack.columns), dtype, "meta"))
        self.register_parameter(f"{stack.name}_sv", zeros((stack.experts, stack.rows), dtype, "meta"))
        return Form(options.codebook_spec, inner, outer, options.seed, tuple(grids))

    def tensor_names(self, name: str) -> Iterator[tuple[str, str]]:
        """For each tensor of a projection's weight, its name in [`QuantizedStack`] and the name of the parameter."""
        for key in (*self.forms[name].tensors, "su", "sv"):
            yield key, f"{name}_{key}"

    def take(self, name: str, quantized: Any, device: torch.device) -> None:
        """Copy the quantized weights of a projection into this module, on this device.

        Args:
            name: of the projection.
            quantized: has `tensors` by name, `su` and `sv`, all stacked (`quantize.stack.QuantizedStack`).
            device: of the copies.

        Raises:
            ValueError: a tensor has another shape.
        """
        values = {**quantized.tensors, "su": quantized.su, "sv": quantized.sv}
        for key, parameter in self.tensor_names(name):
            present = self.get_parameter(parameter)
            if values[key].shape != present.shape:
                raise ValueError(
                    f"{parameter} of these experts must have shape {list(present.shape)}, got {list(values[key].shape)}"
                )
            value = torch.empty(present.shape, dtype=present.dtype, device=device).copy_(values[key])
            self._parameters[parameter] = nn.Parameter(value, requires_grad=False)

    def layer(self, name: str, expert: int) -> Layer:
        """One expert's weight of a projection, as the arguments of the ops."""
        weight, su, sv, *names = self._whole(name)
        return Layer([tensor[expert] for tensor in weight], su[expert], sv[expert], None, *names)

    def product(self, name: str, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """See [`StackedForward.product`]."""
        return torch.ops.quip.grouped_linear(x, ends, *self._whole(name))

    def single(self, name: str, expert: int, x: torch.Tensor) -> torch.Tensor:
        """See [`StackedForward.single`]."""
        return torch.ops.quip.linear(x, *self.layer(name, expert))

    def _whole(self, name: str) -> tuple:
        form, tensors = self.forms[name], self._parameters
        weight = [tensors[f"{name}_{key}"] for key in form.tensors]
        names = (form.codebook, form.incoherence_in, form.incoherence_out, form.seed)
        return weight, tensors[f"{name}_su"], tensors[f"{name}_sv"], *names

    def packed_bytes(self, name: str) -> int:
        """Bytes of all tensors of a projection's weights."""
        found = [self.get_parameter(parameter) for _, parameter in self.tensor_names(name)]
        return sum(tensor.numel() * tensor.element_size() for tensor in found)

    @torch.no_grad()
    def dequantize(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The dense weights of a projection [experts, rows, columns], in this dtype; None: the dtype of su."""
        stack, form = self.stacks[name], self.forms[name]
        dtype = dtype or self.get_parameter(f"{name}_su").dtype
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        device = self.get_parameter(f"{name}_su").device
        result = torch.empty(stack.shape, dtype=dtype, device=device)
        for expert in range(stack.experts):
            layer = self.layer(name, expert)
            weight = torch.ops.quip.decode(layer.weight, layer.codebook, stack.rows, stack.columns, compute)
            weight = torch.ops.quip.transform(weight, form.incoherence_in, form.seed, False) * layer.su.to(compute)
            weight = torch.ops.quip.transform(weight.T.contiguous(), form.incoherence_out, form.seed, False).T
            result[expert] = (weight * layer.sv.to(compute)[:, None]).to(dtype)
        return result

    @torch.no_grad()
    def to_dense(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The module that this one replaced, with dense weights, in this dtype; None: the dtype of su."""
        dense = self._bare[0]
        weights = {name: stack.joined(self.dequantize(name, dtype)) for name, stack in self.stacks.items()}
        others = {name: p for name, p in self._parameters.items() if p is not None and not self._is_packed(name)}
        restored = object.__new__(type(dense))
        restored.__dict__ = {
            **dense.__dict__,
            "_parameters": {},
            "_modules": dict(self._modules),
            "_buffers": self._buffers,
        }
        for name, value in {**weights, **others}.items():
            restored._parameters[name] = nn.Parameter(value.detach().to(dtype) if dtype else value.detach())
        return restored.train(self.training)

    def _is_packed(self, parameter: str) -> bool:
        return any(parameter == own for name in self.stacks for _, own in self.tensor_names(name))

    def reset_parameters(self) -> None:
        """Quantized weights have no random initialisation; only code for dense modules calls this."""
        raise TypeError("quantized experts cannot be initialised at random: load or quantize weights")

    def extra_repr(self) -> str:
        return ", ".join(
            f"{name}: {list(stack.shape)}, codebook={self.forms[name].codebook}, "
            f"bits={8 * self.packed_bytes(name) / stack.weights:.3f}"
            for name, stack in self.stacks.items()
        )


def stacked_grids(stack: Stack, codebook: str, name: str) -> Mapping[str, codebooks.Grid]:
    """The tensors that each expert stores. Raises `ValueError` for a codebook whose tensors cannot be stacked."""
    try:
        grids = codebooks.get(codebook).tensors(stack.rows, stack.columns)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if any(None in grid.shape for grid in grids.values()):
        raise ValueError(
            f"{name}: codebook {codebook!r} stores tensors whose sizes differ from expert to expert, so they cannot be "
            "stacked: choose another codebook for the experts (modules={'experts.*': {'codebook': …}})"
        )
    return grids
