"""Find scales, tables, norms and biases with NaN or infinity, before they make every output of the model NaN."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from .headers import DAMAGED, TensorInfo


@torch.no_grad()
def check_finite(
    modules: Mapping[str, nn.Module], headers: Mapping[str, TensorInfo], read: Callable[[TensorInfo], torch.Tensor]
) -> None:
    """Check that all floating tensors of quantized modules are finite, in the files and in the type that they will have.

    They are read from the files, which are mapped into memory: a tensor that is offloaded to disk or to another device
    is checked as well, and no device has to be synchronized. All of them together are about 1/1000 of a model.

    Args:
        modules: the quantized modules (`nn.QuipLinear`, `nn.QuipEmbedding`) by name, with parameters of the shapes and
            types that they will have.
        headers: shape, type and file of each tensor, by its name in the model.
        read: reads one tensor.

    Raises:
        ValueError: a number is infinite or NaN; or it is too large for the type that the model is loaded in.
    """
    for name, module in modules.items():
        for key, parameter in module.named_parameters():
            info = headers.get(f"{name}.{key}")
            if info is None or not parameter.is_floating_point():
                continue
            value = read(info)
            if not value.isfinite().all():
                raise ValueError(f"{name}.{key} has numbers that are not finite: {DAMAGED}")
            if value.dtype != parameter.dtype and not value.to(parameter.dtype).isfinite().all():
                raise ValueError(
                    f"{name}.{key} has numbers up to {value.abs().max():.3g}, which {parameter.dtype} cannot hold: load "
                    "the model in another dtype, such as torch.bfloat16"
                )


def check_small_finite(
    model: nn.Module, headers: Mapping[str, TensorInfo], read: Callable[[TensorInfo], torch.Tensor]
) -> None:
    """Check that the dense vectors of a checkpoint (weights of norms, biases) are finite in the files.

    Args:
        model: with its quantized modules in their places; on the meta device or not.
        headers, read: see [`check_finite`].

    Raises:
        ValueError: a number is infinite or NaN.
    """
    for name, parameter in model.named_parameters():
        info = headers.get(name)
        if info is None or len(info.shape) > 1 or not parameter.is_floating_point():
            continue
        value = read(info)
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"{name} has numbers that are not finite: {DAMAGED}")
