"""The precision of matrix products: exact for Hessians, quicker for forward passes that only collect statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .device import execution_device, is_linear


@contextmanager
def cpu_matmul_precision(precision: str) -> Iterator[None]:
    """Let oneDNN compute float32 matrix products in `precision` ("ieee", "bf16"; products are added in float32).

    The setting is global in PyTorch; it is restored afterwards.
    """
    setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined] # PyTorch adds it while it is imported
    before = setting.fp32_precision
    try:
        setting.fp32_precision = precision
        yield
    finally:
        setting.fp32_precision = before


def _multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16 products; "no", which is only slower, where PyTorch does not say."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is not None and supported()


def calibration_autocast(model: nn.Module) -> AbstractContextManager:
    """The precision of forward passes that only collect statistics: bfloat16 products for a float32 model on a CPU that
    has instructions for them (twice as fast, and the activations differ by less than 0.4 %), else the model's own."""
    device = execution_device(model)
    first = next((parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()), None)
    if device.type != "cpu" or first != torch.float32 or not _multiplies_bfloat16():
        return nullcontext()
    return torch.autocast("cpu", dtype=torch.bfloat16)


@dataclass
class Precision:
    """Whether the blocks of a model run under [`calibration_autocast`]: some join tensors of two types there and fail.

    Attributes:
        is_exact: autocast is switched off inside of it.
    """

    is_exact: bool = False

    def context(self, device: torch.device) -> AbstractContextManager:
        """For one call of a block."""
        return torch.autocast(device.type, enabled=False) if self.is_exact else nullcontext()

    def gives_way(self, device: torch.device) -> bool:
        """Whether a block that has failed may be tried again: from now on without autocast, if there was one."""
        if self.is_exact or not torch.is_autocast_enabled(device.type):
            return False
        self.is_exact = True
        return True


def autocast_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which a linear reads x: autocast's where it is on, else its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


@contextmanager
def fast_cpu_linears(model: nn.Module) -> Iterator[None]:
    """Let the model's float32 linears on the CPU use bfloat16 factors (products are added in float32): 3 times faster.

    Only the linears: with the same setting, SDPA's many small products would each go through oneDNN, 30 times slower.
    """
    setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined] # PyTorch adds it while it is imported
    before = setting.fp32_precision

    def fast(*_: Any) -> None:
        setting.fp32_precision = "bf16"

    def usual(*_: Any) -> None:
        setting.fp32_precision = before

    with ExitStack() as stack:
        stack.callback(usual)
        for module in model.modules():
            if is_linear(module):
                stack.callback(module.register_forward_pre_hook(fast).remove)
                stack.callback(module.register_forward_hook(usual).remove)
        yield
