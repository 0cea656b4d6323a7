"""The tensors that a quantized module stores for its weight, named and described by its codebook."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .. import codebooks


class StoredTensors(nn.Module):
    """A module with `codebook`, `su` [n] and `sv` [m], whose weight [m, n] is stored in the codebook's tensors.

    Each of them is a frozen parameter of the name that `Codebook.tensors` gives it.

    Attributes:
        tensor_names: their names, in the codebook's order.
    """

    codebook: str
    su: nn.Parameter
    sv: nn.Parameter
    tensor_names: tuple[str, ...]

    def _add_empty(
        self, rows: int, columns: int, device: torch.device | str | None, scales_dtype: torch.dtype | None
    ) -> None:
        """Register the codebook's tensors, su and sv for a [rows, columns] weight, all zeros."""
        grids = codebooks.get(self.codebook).tensors(rows, columns)
        self.tensor_names = tuple(grids)
        for name, grid in grids.items():
            self.register_parameter(name, zeros(grid.empty_shape(), grid.dtype_in(scales_dtype), device))
        self.su, self.sv = zeros((columns,), scales_dtype, device), zeros((rows,), scales_dtype, device)

    def grids(self) -> dict[str, codebooks.Grid]:
        """Shape and type of each stored tensor."""
        return codebooks.get(self.codebook).tensors(self.sv.shape[0], self.su.shape[0])

    def stored(self) -> dict[str, torch.Tensor]:
        """The stored tensors by name."""
        # no assignment expression in a comprehension: torch.compile cannot trace it
        found = [(name, self._parameters[name]) for name in self.tensor_names]
        return {name: tensor for name, tensor in found if tensor is not None}

    def resize_stored(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Make room for tensors whose sizes were not known: empty ones, on the device of the present ones.

        Args:
            shapes: by name; names of other tensors, and sizes that do not fit, are ignored.
        """
        for name, grid in self.grids().items():
            shape, present = shapes.get(name), self.get_parameter(name)
            if shape is not None and tuple(shape) != present.shape and None in grid.shape and grid.fits(shape):
                self._parameters[name] = nn.Parameter(present.new_empty(tuple(shape)), requires_grad=False)

    def take(self, quantized: Any, device: torch.device) -> None:
        """Copy a quantized weight into this module.

        Args:
            quantized: has `tensors` by name, `su` [n] and `sv` [m] (`quantize.layer.QuantizedWeight`).
            device: of the copies. The module itself may be on the meta device.

        Raises:
            ValueError: the tensors do not fit this module's codebook and size.
        """
        rows, columns = self.sv.shape[0], self.su.shape[0]
        codebooks.get(self.codebook).check(quantized.tensors, rows, columns)
        for name in ("su", "sv"):
            given, size = getattr(quantized, name), self.get_parameter(name).shape
            if given.shape != size:
                raise ValueError(
                    f"{name} of a [{rows}, {columns}] weight must have shape {list(size)}, got {list(given.shape)}"
                )
        for name, given in {**quantized.tensors, "su": quantized.su, "sv": quantized.sv}.items():
            # Always a copy: linears that read one input are given one su, and safetensors saves no shared tensors.
            value = torch.empty(given.shape, dtype=self.get_parameter(name).dtype, device=device).copy_(given)
            self._parameters[name] = nn.Parameter(value, requires_grad=False)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        self.resize_stored({n: state_dict[prefix + n].shape for n in self.tensor_names if prefix + n in state_dict})
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def zeros(shape: Sequence[int], dtype: torch.dtype | None, device: torch.device | str | None = None) -> nn.Parameter:
    """A frozen parameter of zeros."""
    return nn.Parameter(torch.zeros(tuple(shape), dtype=dtype, device=device), requires_grad=False)
