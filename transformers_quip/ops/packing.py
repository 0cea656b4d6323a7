"""The forms of a layer's codes: the stored form, the form of the Triton kernels, and the expanded form for a CPU.

All hold the same weights exactly, and every op takes each of them. A form other than the stored one is made on the device
where its kernels will run, and replaces the stored one. The expanded form of E8P (`quip_kernels.cpu_nibbles`) has four
bits for a weight of two; tensors of one weight may have different ones of these two forms. That of trellis codes
(`quip_kernels.cpu_records`) has the codes and one byte for a weight. A table that it was made with gets a first dimension
of size 1, so that a table which is set later is not taken for it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from quip_kernels import cpu, cpu_nibbles, cpu_records, cpu_trellis
from quip_kernels import layout as kernels
from quip_kernels.cpu_library import LEVELS, LEVELS_FOR_NIBBLES, LEVELS_FOR_RECORDS, default_level

from .. import codebooks
from ..memory import free_memory
from .backend import for_device, get_activations, get_memory, settings
from .cpu.route import planes

# Bytes of memory that stay free where codes are expanded without being asked to.
RESERVE = 2 << 30
# Codes that were not expanded for want of memory, with the settings at that time: the system is not asked again.
_refused: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


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
    return any(cpu_nibbles.is_nibbles(v) or cpu_records.is_records(v) or _is_marked(v) for v in weight)


def _is_marked(table: torch.Tensor) -> bool:
    """Whether this is the table of trellis codes in the expanded form."""
    return table.ndim == 3 and table.is_floating_point()


def is_records(weight: Sequence[torch.Tensor]) -> bool:
    """Whether these tensors are the expanded form of trellis codes, all of them made together."""
    return cpu_records.is_records(weight[0]) and all(map(_is_marked, weight[1:]))


@functools.cache
def trellis_layout(codebook: str) -> cpu_trellis.Layout:
    """The codes of a trellis codebook as the library takes them."""
    book: Any = codebooks.get(codebook)
    return cpu_trellis.Layout(book.code, book.k, book.order)


def is_stored(weight: Sequence[torch.Tensor], codebook: str) -> bool:
    """Whether these tensors are in the stored form."""
    return not (is_packed(weight, codebook) or is_expanded(weight))


def converted(weight: Sequence[torch.Tensor], codebook: str, dtype: torch.dtype) -> Sequence[torch.Tensor]:
    """The tensors of a weight in their device's fastest form; the same list if they have it.

    Args:
        dtype: of the activations.
    """
    if is_wanted(weight, codebook):
        return pack(_collapsed(weight, codebook))
    if _is_expansion_wanted(weight, codebook, dtype):
        return _expanded(_collapsed(weight, codebook), codebook)
    if is_expanded(weight) and (get_memory() == "compact" or _is_mixed(weight, codebook)):
        return _collapsed(weight, codebook)
    return weight


def _is_mixed(weight: Sequence[torch.Tensor], codebook: str) -> bool:
    """Whether a weight has records of trellis codes without the table that they were made with, or that table alone."""
    return _is_trellis(codebook) and not is_records(weight)


def _is_trellis(codebook: str) -> bool:
    return codebooks.get(codebook).kernels == "trellis"


def _expanded(weight: Sequence[torch.Tensor], codebook: str) -> list[torch.Tensor]:
    """Stored tensors, or some stages of E8P in nibbles, in the expanded form."""
    if _is_trellis(codebook):
        table = weight[1] if len(weight) > 1 else None
        records = cpu_trellis.expand(weight[0], trellis_layout(codebook), table)
        return [records] if table is None else [records, table.unsqueeze(0)]
    return [cpu_nibbles.expand(codes) for codes in weight]


def _collapsed(weight: Sequence[torch.Tensor], codebook: str) -> list[torch.Tensor]:
    """The stored form of tensors of which any are in the expanded form."""
    if _is_trellis(codebook):
        codes, *table = weight
        if cpu_records.is_records(codes):
            codes = cpu_records.collapse(codes, trellis_layout(codebook).pair_bits)
        return [codes, *(t[0] if _is_marked(t) else t for t in table)]
    return [cpu_nibbles.collapse(codes) if cpu_nibbles.is_nibbles(codes) else codes for codes in weight]


def _is_expansion_wanted(weight: Sequence[torch.Tensor], codebook: str, dtype: torch.dtype) -> bool:
    """Whether codes should be expanded: AVX2 and ARM multiply nibbles faster, AVX2 records as well, AVX-512 neither."""
    wanted = get_memory()
    if wanted == "compact" or for_device(weight[0].device) != "cpu" or not cpu.is_available():
        return False
    has_nibbles, current = has_packed_form(codebook), settings()
    if LEVELS[default_level()] not in (LEVELS_FOR_NIBBLES if has_nibbles else LEVELS_FOR_RECORDS):
        return False
    if wanted != "fast" and _refused.get(weight[0]) is current:
        return False
    size = _size_of_nibbles(weight) if has_nibbles else _size_of_records(weight, codebook, dtype)
    if not size or wanted == "fast":
        return bool(size)
    fits = size + RESERVE <= free_memory(weight[0].device)
    if not fits:
        _refused[weight[0]] = current
    return fits


def _size_of_nibbles(weight: Sequence[torch.Tensor]) -> int:
    """Bytes of the nibbles of stages that are not expanded yet, or more; 0 if they cannot be, or if there are none."""
    codes = [tensor for tensor in weight if not cpu_nibbles.is_nibbles(tensor)]
    if not all(map(cpu_nibbles.can_expand, codes)):
        return 0
    return 4 * sum(tensor.numel() * tensor.element_size() for tensor in codes)  # E8 takes four times its bytes


def _size_of_records(weight: Sequence[torch.Tensor], codebook: str, dtype: torch.dtype) -> int:
    """Bytes of the records of trellis codes; 0 if they are there, or cannot be, or if activations have more than 8 bits.

    Bytes of weights are as exact as bytes of activations; where those are not wanted, codes are multiplied.
    """
    if not _is_trellis(codebook) or is_records(weight) or planes(dtype, get_activations()) != 1:
        return 0
    codes, *table = _collapsed(weight, codebook)
    layout = trellis_layout(codebook)
    if not cpu_records.can_expand(codes, layout.pair_bits, *table):
        return 0
    rows, size = cpu_records.shape_of_records(len(codes), cpu_trellis.columns_of(codes, layout), layout.pair_bits)
    return rows * size


def pack(weight: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Stored codes in the kernels' form (`quip_kernels.layout.pack`), each stage by itself."""
    return [kernels.pack(codes) for codes in weight]


def stored(weight: Sequence[torch.Tensor], codebook: str, columns: int) -> Sequence[torch.Tensor]:
    """Tensors of any form, in the stored form.

    Raises:
        ValueError: tensors in the form of the Triton kernels do not fit a weight with this number of columns.
    """
    if is_expanded(weight):
        return _collapsed(weight, codebook)
    return [kernels.unpack(codes, columns) for codes in weight] if is_packed(weight, codebook) else weight


def stored_bytes(weight: Sequence[torch.Tensor], codebook: str, columns: int) -> int:
    """Bytes of these tensors in the stored form, whichever form they have."""
    if is_packed(weight, codebook):
        # as many planes as a code has bytes
        return sum(planes * rows * math.ceil(columns / 8) for planes, rows, _ in (codes.shape for codes in weight))
    if is_expanded(weight) and _is_trellis(codebook):
        weight = _collapsed(weight, codebook)
    return sum(map(cpu_nibbles.bytes_of_codes, weight))
