"""The codes of a quantized linear in the form of the Triton kernels, and in the stored form for everything else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..ops import packing
from .stored import StoredTensors


class PackedCodes(StoredTensors):
    """Codes that [`pack`] converts into the form of the Triton kernels, which replaces the stored form.

    Codes that leave the module (state_dict, copies, pickles) or the GPU are in the stored form again.
    """

    def weight_tensors(self) -> list[torch.Tensor]:
        """The tensors of the weight in their order, as they are."""
        parameters: dict[str, Any] = self._parameters  # those of the weight are never None
        return [parameters[name] for name in self.tensor_names]

    @property
    def is_packed(self) -> bool:
        """Whether the codes are in the form of the Triton kernels."""
        return packing.is_packed(self.weight_tensors(), self.codebook)

    def stored(self) -> dict[str, torch.Tensor]:
        """See [`StoredTensors.stored`]; in the stored form, whichever the module has."""
        tensors = packing.stored(self.weight_tensors(), self.codebook, self.su.shape[0])
        return dict(zip(self.tensor_names, tensors, strict=True))

    def pack(self) -> None:
        """Convert the codes into the form of the Triton kernels, if needed. Raises `TypeError` without such a form."""
        if not self.is_packed:
            self._set(dict(zip(self.tensor_names, packing.pack(self.weight_tensors()), strict=True)))

    def unpack(self) -> None:
        """Convert the codes into the stored form, if needed."""
        if self.is_packed:
            self._set(self.stored())

    def pack_if_wanted(self) -> None:
        """[`pack`] if Triton kernels will compute this module; not if hooks move its codes, or processes share them."""
        weight = self.weight_tensors()
        is_plain = all(type(tensor) in (torch.Tensor, nn.Parameter) for tensor in weight)
        if is_plain and packing.is_wanted(weight, self.codebook) and not self._is_offloaded():
            self.pack()

    def _is_offloaded(self) -> bool:
        hook = getattr(self, "_hf_hook", None)  # of accelerate; a sequence of several has `hooks`
        return any(getattr(part, "offload", False) for part in getattr(hook, "hooks", (hook,)))

    def _set(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, value in tensors.items():
            self._parameters[name] = nn.Parameter(value, requires_grad=False)

    def _unpack_off_the_gpu(self) -> None:
        if self.is_packed and not packing.is_run_by_kernels(self.weight_tensors()):
            self.unpack()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.is_packed:
            for name, value in self.stored().items():
                destination[prefix + name] = nn.Parameter(value, requires_grad=False) if keep_vars else value

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        if any(prefix + name in state_dict for name in self.tensor_names):
            self.unpack()
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        if self.is_packed:
            codes = {name: nn.Parameter(value, requires_grad=False) for name, value in self.stored().items()}
            state["_parameters"] = self._parameters | codes
        return state
