"""The two layouts of a layer's codes: the logical one, which is stored, and that of the Triton kernels, which is run.

Both hold the same bits, and every op takes either. The kernels' is made where they are going to run and replaces the other.
"""

from __future__ import annotations

import math

import torch

from quip_kernels import layout as kernels

from .backend import uses_triton

# Codebooks that the kernels know. Their codes are never int32 in the logical layout, and always in that of the kernels.
CODEBOOKS = ("e8p", "e8p-rvq3", "e8p-rvq4")
DEVICES = ("cuda", "xpu")


def is_packed(codes: torch.Tensor, codebook: str) -> bool:
    """Whether these codes are in the kernels' layout."""
    return codes.dtype == torch.int32 and codebook in CODEBOOKS


def is_wanted(codes: torch.Tensor, codebook: str) -> bool:
    """Whether these codes should be brought into the kernels' layout: they lie where the kernels will run."""
    return is_run_by_kernels(codes) and codebook in CODEBOOKS and not is_packed(codes, codebook)


def is_run_by_kernels(codes: torch.Tensor) -> bool:
    """Whether Triton kernels compute what lies where these codes lie."""
    return codes.device.type in DEVICES and uses_triton()


def pack(codes: torch.Tensor, codes_residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logical codes in the kernels' layout (`quip_kernels.layout.pack`), each stage by itself."""
    return kernels.pack(codes), None if codes_residual is None else kernels.pack(codes_residual)


def logical(
    codes: torch.Tensor, codes_residual: torch.Tensor | None, codebook: str, columns: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Codes of either layout in the logical one.

    Raises:
        ValueError: the kernels' layout is not that of so many columns.
    """
    if not is_packed(codes, codebook):
        return codes, codes_residual
    return kernels.unpack(codes, columns), None if codes_residual is None else kernels.unpack(codes_residual, columns)


def stored_bytes(codes: torch.Tensor, codebook: str, columns: int) -> int:
    """Bytes of these codes, whichever layout they have, in the logical one."""
    if is_packed(codes, codebook):
        planes, rows, _ = codes.shape  # as many planes as a code has bytes
        return rows * math.ceil(columns / 8) * planes
    return codes.numel() * codes.element_size()
