"""The forms of a layer's codes: the stored form, the form of the Triton kernels, and the expanded form for a CPU.

All hold the same weights exactly, and every op takes each of them. A form other than the stored one is made on the device
where its kernels will run, and replaces the stored one. The expanded form (`quip_kernels.cpu_nibbles`) has four bits for a
weight where E8P has two; tensors of one weight may have different ones of these two forms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from quip_kernels import cpu, cpu_nibbles
from quip_kernels import layout as kernels
from quip_kernels.cpu_library import LEVELS, LEVELS_FOR_NIBBLES, default_level

from .. import codebooks
from ..memory import free_memory
from .backend import for_device, get_memory

# Bytes of memory that stay free where codes are expanded without being asked to.
RESERVE = 2 << 30


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


def is_expanded(weight: Sequence[torch.Tensor]) -> bool:
    """Whether a tensor of a weight is in the expanded form."""
    return any(map(cpu_nibbles.is_nibbles, weight))


def is_stored(weight: Sequence[torch.Tensor], codebook: str) -> bool:
    """Whether these tensors are in the stored form."""
    return not (is_packed(weight, codebook) or is_expanded(weight))


def converted(weight: Sequence[torch.Tensor], codebook: str) -> Sequence[torch.Tensor]:
    """The tensors of a weight in their device's fastest form; the same list if they have it."""
    if is_wanted(weight, codebook):
        return pack(_collapsed(weight))
    if _is_expansion_wanted(weight, codebook):
        return [codes if cpu_nibbles.is_nibbles(codes) else cpu_nibbles.expand(codes) for codes in weight]
    if is_expanded(weight) and get_memory() == "compact":
        return _collapsed(weight)
    return weight


def _collapsed(weight: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    return [cpu_nibbles.collapse(codes) if cpu_nibbles.is_nibbles(codes) else codes for codes in weight]


def _is_expansion_wanted(weight: Sequence[torch.Tensor], codebook: str) -> bool:
    """Whether codes should be expanded: AVX2 and ARM multiply nibbles faster, AVX-512 and plain C do not."""
    codes = [tensor for tensor in weight if not cpu_nibbles.is_nibbles(tensor)]
    wanted = get_memory()
    if not codes or wanted == "compact" or for_device(codes[0].device) != "cpu" or not cpu.is_available():
        return False
    if not has_packed_form(codebook) or LEVELS[default_level()] not in LEVELS_FOR_NIBBLES:
        return False
    if not all(map(cpu_nibbles.can_expand, codes)):
        return False
    size = sum(tensor.numel() * tensor.element_size() for tensor in codes)
    return wanted == "fast" or 4 * size + RESERVE <= free_memory(codes[0].device)  # E8 takes four times its bytes


def pack(weight: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Stored codes in the kernels' form (`quip_kernels.layout.pack`), each stage by itself."""
    return [kernels.pack(codes) for codes in weight]


def stored(weight: Sequence[torch.Tensor], codebook: str, columns: int) -> Sequence[torch.Tensor]:
    """Tensors of any form, in the stored form.

    Raises:
        ValueError: tensors in the form of the Triton kernels do not fit a weight with this number of columns.
    """
    if is_expanded(weight):
        return _collapsed(weight)
    return [kernels.unpack(codes, columns) for codes in weight] if is_packed(weight, codebook) else weight


def stored_bytes(weight: Sequence[torch.Tensor], codebook: str, columns: int) -> int:
    """Bytes of these tensors in the stored form, whichever form they have."""
    if is_packed(weight, codebook):
        # as many planes as a code has bytes
        return sum(planes * rows * math.ceil(columns / 8) for planes, rows, _ in (codes.shape for codes in weight))
    return sum(map(cpu_nibbles.bytes_of_codes, weight))
