"""The two forms of a layer's codes: the stored form, and the form of the Triton kernels.

Both hold the same bits, and every op takes either. The kernels' form is made on the device where they will run, and
replaces the stored one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from quip_kernels import layout as kernels

from .. import codebooks
from .backend import for_device


def has_packed_form(codebook: str) -> bool:
    """Whether the kernels have a form of their own for codes of this codebook.

    Stored codes of these codebooks are never int32, and packed ones always are.
    """
    return codebooks.get(codebook).kernels == "e8p"


def is_packed(weight: Sequence[torch.Tensor], codebook: str) -> bool:
    """Whether these tensors are in the kernels' form."""
    return weight[0].dtype == torch.int32 and has_packed_form(codebook)


def is_wanted(weight: Sequence[torch.Tensor], codebook: str) -> bool:
    """Whether these tensors should be brought into the kernels' form: the kernels will run on their device."""
    return is_run_by_kernels(weight) and has_packed_form(codebook) and not is_packed(weight, codebook)


def is_run_by_kernels(weight: Sequence[torch.Tensor]) -> bool:
    """Whether Triton kernels compute on the device of these tensors."""
    return for_device(weight[0].device) == "triton"


def pack(weight: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Stored codes in the kernels' form (`quip_kernels.layout.pack`), each stage by itself."""
    return [kernels.pack(codes) for codes in weight]


def stored(weight: Sequence[torch.Tensor], codebook: str, columns: int) -> Sequence[torch.Tensor]:
    """Tensors of either form, in the stored form.

    Raises:
        ValueError: tensors in the kernels' form do not fit a weight with this number of columns.
    """
    return [kernels.unpack(codes, columns) for codes in weight] if is_packed(weight, codebook) else weight


def stored_bytes(weight: Sequence[torch.Tensor], codebook: str, columns: int) -> int:
    """Bytes of these tensors in the stored form, whichever form they have."""
    if is_packed(weight, codebook):
        # as many planes as a code has bytes
        return sum(planes * rows * math.ceil(columns / 8) for planes, rows, _ in (codes.shape for codes in weight))
    return sum(tensor.numel() * tensor.element_size() for tensor in weight)
