"""The one constructor of a quantized linear without values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..incoherence import IN_BLOCKS, STORED, sides
from .general import GeneralLinear
from .linear import QuipLinear


def empty_linear(
    rows: int, columns: int, config: Any, name: str, *, bias: bool, dtype: torch.dtype, conv1d: bool = False
) -> QuipLinear:
    """A quantized linear of [rows, columns] on the meta device, as the config wants the one of this name.

    Args:
        rows, columns: m and n.
        config: has `for_module` and `layout_of` (`QuipConfig`).
        name: of the module.
        bias: whether there is one.
        dtype: of the floating parameters.
        conv1d: see [`QuipLinear`].

    Raises:
        ValueError: the codebook, the transforms or the layout do not fit these sizes; the message names the module.
    """
    options, layout = config.for_module(name), config.layout_of(name)
    arguments: dict[str, Any] = {
        "codebook": options.codebook_spec,
        "incoherence": options.incoherence,
        "seed": options.seed,
        "conv1d": conv1d,
        "device": "meta",
        "dtype": dtype,
        "scales_dtype": None if layout.scales_dtype is None else getattr(torch, layout.scales_dtype),
    }
    padded = layout.padded or (rows, columns)
    check_transforms(name, options.incoherence, *padded)
    try:
        if layout.padded or layout.row_scales or STORED in sides(options.incoherence):
            return GeneralLinear(columns, rows, bias, padded=layout.padded, row_scales=layout.row_scales, **arguments)
        return QuipLinear(columns, rows, bias, **arguments)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def empty_like(linear: nn.Module, config: Any, name: str) -> QuipLinear:
    """An empty quantized linear in the place of a dense one. The bias is the dense one's parameter, loaded or not.

    Args:
        linear: `nn.Linear` or `Conv1D`; its sizes, its bias and its weight's dtype are used.
        config, name: see [`empty_linear`].
    """
    conv1d = isinstance(linear, Conv1D)
    rows, columns = reversed(linear.weight.shape) if conv1d else linear.weight.shape
    biased = linear.bias is not None
    module = empty_linear(rows, columns, config, name, bias=biased, dtype=linear.weight.dtype, conv1d=conv1d)
    if biased:
        module.bias = linear.bias
    return module.train(linear.training)


def check_transforms(name: str, incoherence: str | Sequence[str], rows: int, columns: int) -> None:
    """Refuse transforms that there are not for these sizes, before a forward needs them.

    Raises:
        ValueError: it names the module.
    """
    for side, size in zip(sides(incoherence), (columns, rows), strict=True):
        if size % IN_BLOCKS.get(side, 1):
            raise ValueError(
                f"{name}: the transform {side} needs a multiple of {IN_BLOCKS[side]} numbers, and there are {size}"
            )
