"""The stand-in for the weight that a quantized linear does not have."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from typing_extensions import Self

_T: Any = torch.Tensor  # its attributes are descriptors, which its stubs do not say
# The functions that the stand-in allows: those that neither read nor write a value.
METADATA = {
    # attributes
    *(
        property_.__get__
        for property_ in (
            _T.shape,
            _T.dtype,
            _T.device,
            _T.layout,
            _T.ndim,
            _T.itemsize,
            _T.nbytes,
            _T.requires_grad,
            _T.grad,
            _T.grad_fn,
            _T.is_leaf,
            _T.is_meta,
            _T.is_cpu,
            _T.is_cuda,
            _T.is_xpu,
            _T.is_mps,
            _T.is_sparse,
            _T.is_quantized,
            _T.is_nested,
        )
    ),
    # methods
    _T.size,
    _T.dim,
    _T.ndimension,
    _T.numel,
    _T.nelement,
    _T.element_size,
    _T.stride,
    _T.storage_offset,
    _T.is_contiguous,
    _T.is_floating_point,
    _T.is_complex,
    _T.get_device,
    _T.__len__,
    _T.__hash__,
}

_NO_VALUES = (
    "the weight of a quantized linear is stored as codes and has no values to read or change. Merging adapters needs a "
    "dense weight: call model.dequantize() before it, or round again with transformers_quip.peft.merge_and_requantize. "
    "QuipLinear.dequantize() gives the weight of one module. If the model's own code reads it, leave that module dense "
    "(modules_to_not_convert)"
)


class PackedWeight(torch.Tensor):
    """Has the shape, dtype and device of a dense weight, and no values: using them raises `ValueError`.

    Otherwise, code that reads `linear.weight` instead of calling the module (merging a LoRA adapter, a model that
    multiplies by the weight itself) would silently compute with garbage.
    """

    # Transformers' initialisation, which some models begin at the parent of a linear, leaves such a tensor alone.
    _is_hf_initialized = True
    # The text of an error.
    _no_values = _NO_VALUES

    @classmethod
    def like(cls, vector: torch.Tensor, out_features: int, in_features: int, dtype: torch.dtype) -> Self:
        """A stand-in of shape [out_features, in_features] and this dtype, on the device of `vector`; no memory."""
        return vector.detach().new_empty((), dtype=dtype).expand(out_features, in_features).as_subclass(cls)

    @property  # type: ignore[override]
    def data(self) -> PackedWeight:
        """Itself: `.data` is also used to read metadata."""
        return self

    @data.setter
    def data(self, value: Any) -> None:
        raise ValueError(f"data: {self._no_values}")

    def __repr__(self) -> str:  # type: ignore[override] # without the contents
        return f"{type(self).__name__}(shape={list(self.shape)}, dtype={self.dtype}, device={self.device})"

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func in METADATA:
            return super().__torch_function__(func, types, args, kwargs or {})
        # Not a TypeError: Tensor's arithmetic would turn that into "unsupported operand type" without the reason.
        raise ValueError(f"{getattr(func, '__name__', func)}: {cls._no_values}")


class PackedTable(PackedWeight):
    """The same for the table of a quantized embedding."""

    _no_values = (
        "the table of a quantized embedding is stored as codes and has no values to read or change. Another number of "
        "tokens (resize_token_embeddings), tied embeddings and merging adapters need a dense table: change the model "
        "before it is quantized, or call model.dequantize()"
    )
