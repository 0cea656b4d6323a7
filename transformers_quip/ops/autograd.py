"""Derivatives of the ops, written with the ops themselves: they run on every device and under torch.compile."""

from __future__ import annotations

from typing import Any

import torch

from .layer import Layer
from .reference import compute_dtype


def _transform_setup(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    _, ctx.incoherence, ctx.seed, ctx.transpose = inputs


def _transform_backward(ctx: Any, grad: torch.Tensor) -> tuple:
    # Q is orthogonal: the derivative of Q x is Qᵀ.
    return torch.ops.quip.transform(grad, ctx.incoherence, ctx.seed, not ctx.transpose), None, None, None


def _linear_setup(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    x, *arguments = inputs
    layer = Layer(*arguments)
    ctx.names = (layer.codebook, layer.incoherence_in, layer.incoherence_out, layer.seed)
    ctx.bias_dtype = None if layer.bias is None else layer.bias.dtype
    ctx.save_for_backward(x, layer.su, layer.sv, *layer.weight)


def _linear_backward(ctx: Any, grad: torch.Tensor) -> tuple:
    """The gradients with respect to x, su, sv and bias. Stored tensors are given none: codes are integers."""
    x, su, sv, *stored = ctx.saved_tensors
    needs_x, _, needs_su, needs_sv, needs_bias, *_ = ctx.needs_input_grad
    codebook, incoherence_in, incoherence_out, seed = ctx.names
    dtype = compute_dtype(x.dtype)
    grad = grad.to(dtype)
    grad_x = grad_su = grad_sv = grad_bias = None

    if needs_bias:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    if needs_x or needs_su or needs_sv:
        weight = torch.ops.quip.decode(stored, codebook, sv.shape[0], su.shape[0], dtype)
    if needs_x or needs_su:
        inner = torch.ops.quip.transform(grad * sv.to(dtype), incoherence_out, seed, True) @ weight
        inner = torch.ops.quip.transform(inner, incoherence_in, seed, False)
        if needs_x:
            grad_x = (inner * su.to(dtype)).to(x.dtype)
        if needs_su:
            grad_su = (inner * x.to(dtype)).reshape(-1, x.shape[-1]).sum(0).to(su.dtype)
    if needs_sv:
        outer = torch.ops.quip.transform(x.to(dtype) * su.to(dtype), incoherence_in, seed, True) @ weight.T
        outer = torch.ops.quip.transform(outer, incoherence_out, seed, False)
        grad_sv = (grad * outer).reshape(-1, grad.shape[-1]).sum(0).to(sv.dtype)
    return grad_x, [None] * len(stored), grad_su, grad_sv, grad_bias, None, None, None, None


def register() -> None:
    """Register the derivatives of quip::transform and quip::linear; quip::decode has none."""
    torch.library.register_autograd("quip::transform", _transform_backward, setup_context=_transform_setup)
    torch.library.register_autograd("quip::linear", _linear_backward, setup_context=_linear_setup)
