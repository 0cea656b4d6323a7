"""The one constructor of a quantized linear without values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..incoherence import STORED, multiple_of, sides
from .general import GeneralLinear
from .linear import QuipLinear


def empty_linear(
    rows: int, columns: int, config: Any, name: str, *, bias: bool, dtype: torch.dtype, conv1d: bool = False
) -> QuipLinear:
    """A quantized linear of [rows, columns] on the meta device, with the config's options for this name.

    Args:
        rows, columns: m and n.
        config: has `for_module` and `storage_of` (`QuipConfig`).
        name: of the module.
        bias: whether it has one.
        dtype: of the floating parameters.
        conv1d: see [`QuipLinear`].

    Raises:
        ValueError: the codebook, the transforms or the record of config.json do not fit; the message names the module.
    """
    options, storage = config.for_module(name), config.storage_of(name)
    arguments: dict[str, Any] = {
        "codebook": options.codebook_spec,
        "incoherence": options.incoherence,
        "seed": options.seed,
        "conv1d": conv1d,
        "device": "meta",
        "dtype": dtype,
        "scales_dtype": None if storage.scales_dtype is None else getattr(torch, storage.scales_dtype),
    }
    check_transforms(name, options.incoherence, *(storage.padded or (rows, columns)))
    try:
        if storage.padded or storage.row_scales or STORED in sides(options.incoherence):
            return GeneralLinear(columns, rows, bias, padded=storage.padded, row_scales=storage.row_scales, **arguments)
        return QuipLinear(columns, rows, bias, **arguments)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def check_transforms(name: str, incoherence: str | Sequence[str], rows: int, columns: int) -> None:
    """Refuse transforms that there are not for these sizes, before a forward needs them.

    Raises:
        ValueError: it names the module.
    """
    for side, size in zip(sides(incoherence), (columns, rows), strict=True):
        block = multiple_of(side)
        if size % block:
            raise ValueError(f"{name}: the transform {side} needs a multiple of {block} numbers, and there are {size}")
