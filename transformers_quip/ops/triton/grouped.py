"""The linears of many experts on GPUs: one launch for all tokens, in which each program finds its expert by itself."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from ... import codebooks
from .. import grouped, reference
from ..backend import TRITON_DEVICES
from .route import DTYPES, Family
from .run import plan_on, trusted


def grouped_linear(
    x: torch.Tensor,
    ends: torch.Tensor,
    weight: list[torch.Tensor],
    su: torch.Tensor,
    sv: torch.Tensor,
    codebook: str,
    incoherence_in: str,
    incoherence_out: str,
    seed: int,
) -> torch.Tensor:
    """See [`grouped.grouped_linear`]; the kernels read E8P codes and their second stages in the stored form.

    Activations between transform and codes are rounded to float16 with a scale for each token; to two such numbers (22
    bits) if x is float32. Other codebooks, float64, and devices on which the kernels are wrong are left to PyTorch.
    """
    book = codebooks.get(codebook)
    has_kernel = book.kernels == "e8p" and x.dtype in DTYPES and x.numel() > 0 and su.dtype in DTYPES and sv.dtype in DTYPES
    if not has_kernel or Family.GROUPED not in trusted(x.device):
        return grouped.grouped_linear(x, ends, weight, su, sv, codebook, incoherence_in, incoherence_out, seed)
    from quip_kernels.gpu import grouped as kernels
    from quip_kernels.gpu import small_batch

    (tokens, columns), rows = x.shape, sv.shape[1]
    which = grouped.expert_of(ends, tokens).clamp(max=len(sv) - 1)
    inner = _inputs(
        x.contiguous(), su.contiguous(), which, plan_on(x.device, incoherence_in, columns, seed), incoherence_in, seed
    )
    width = -(-columns // kernels.ALIGNMENT) * kernels.ALIGNMENT
    halves = small_batch.halves(inner, 2 if x.dtype == torch.float32 else 1, width=width)
    codes, *residual = (stage.contiguous() for stage in weight)
    y = kernels.grouped(halves, ends.contiguous(), codes, residual[0] if residual else None, book.residual_scale or 0.0)
    plan = plan_on(x.device, incoherence_out, rows, seed)
    if plan is None:
        y = reference.transform(y.sum(0), incoherence_out, seed, False) * sv[which].float()
        return y.to(x.dtype)
    from quip_kernels.gpu.transform import transform

    return transform(y, plan, False, x.dtype, post=sv.contiguous(), which=which)


def _inputs(x: torch.Tensor, su: torch.Tensor, which: torch.Tensor, plan: Any, incoherence: str, seed: int) -> torch.Tensor:
    """Q_inᵀ( su_e ⊙ x ): float32 [tokens, n]."""
    if plan is None:
        return reference.transform(x.float() * su[which].float(), incoherence, seed, True)
    from quip_kernels.gpu.transform import transform

    return transform(x, plan, True, torch.float32, pre=su, which=which)


def register() -> None:
    """Make this the implementation on CUDA, ROCm and XPU devices, if the package `triton` is installed."""
    if importlib.util.find_spec("triton") is not None:
        for device in TRITON_DEVICES:
            torch.library.impl("quip::grouped_linear", device, grouped_linear)
