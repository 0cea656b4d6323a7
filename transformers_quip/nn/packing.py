"""The codes of a quantized linear in the form that kernels compute fastest, and in the stored form for everything else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..ops import packing
from .stored import StoredTensors


class PackedCodes(StoredTensors):
    """Codes that [`pack_if_wanted`] converts into another form (see `ops.packing`), which replaces the stored form.

    Codes that leave the module (state_dict, copies, pickles) or the GPU are in the stored form again.

    Attributes:
        weight_dtype: of the dense weight, and most likely of activations.
    """

    weight_dtype: torch.dtype

    def weight_tensors(self) -> list[torch.Tensor]:
        """The tensors of the weight in their order, as they are."""
        parameters: dict[str, Any] = self._parameters  # those of the weight are never None
        return [parameters[name] for name in self.tensor_names]

    @property
    def is_packed(self) -> bool:
        """Whether the codes are in the form of the Triton kernels."""
        return packing.is_packed(self.weight_tensors(), self.codebook)

    @property
    def is_stored(self) -> bool:
        """Whether the codes are in the stored form."""
        return packing.is_stored(self.weight_tensors(), self.codebook)

    def stored(self) -> dict[str, torch.Tensor]:
        """See [`StoredTensors.stored`]; in the stored form, whichever the module has."""
        tensors = packing.stored(self.weight_tensors(), self.codebook, self.su.shape[0])
        return dict(zip(self.tensor_names, tensors, strict=True))

    @torch.inference_mode(False)  # tensors made in that mode could not be used outside of it
    def pack(self) -> None:
        """Convert the codes into the form of the Triton kernels, if needed. Raises `TypeError` without such a form."""
        if not self.is_packed:
            self._replace(packing.pack(list(self.stored().values())))

    @torch.inference_mode(False)
    def unpack(self) -> None:
        """Convert the codes into the stored form, if needed."""
        if not self.is_stored:
            self._replace(list(self.stored().values()))

    @torch.inference_mode(False)
    def pack_if_wanted(self) -> None:
        """Convert the codes into their device's fastest form; not if hooks move them, or processes share them."""
        weight = self.weight_tensors()
        is_plain = all(type(tensor) in (torch.Tensor, nn.Parameter) for tensor in weight)
        if is_plain and not self._is_offloaded():
            wanted = packing.converted(weight, self.codebook, self.weight_dtype)
            if wanted is not weight:
                self._replace(wanted)

    def _is_offloaded(self) -> bool:
        hook = getattr(self, "_hf_hook", None)  # of accelerate; a sequence of several has `hooks`
        return any(getattr(part, "offload", False) for part in getattr(hook, "hooks", (hook,)))

    def _replace(self, tensors: Sequence[torch.Tensor]) -> None:
        for name, value in zip(self.tensor_names, tensors, strict=True):
            if value is not self._parameters[name]:
                self._parameters[name] = nn.Parameter(value, requires_grad=False)

    def _apply(self, fn: Callable, recurse: bool = True) -> PackedCodes:
        was_expanded = packing.is_expanded(self.weight_tensors())
        if was_expanded:  # only a CPU can take that form back
            self.unpack()
        super()._apply(fn, recurse)
        if was_expanded:
            self.pack_if_wanted()
        return self

    def _unpack_off_the_gpu(self) -> None:
        if self.is_packed and not packing.is_run_by_kernels(self.weight_tensors()):
            self.unpack()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.is_stored:
            for name, value in self.stored().items():
                destination[prefix + name] = nn.Parameter(value, requires_grad=False) if keep_vars else value

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        if any(prefix + name in state_dict for name in self.tensor_names):
            self.unpack()
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        if not self.is_stored:
            codes = {name: nn.Parameter(value, requires_grad=False) for name, value in self.stored().items()}
            state["_parameters"] = self._parameters | codes
        return state
