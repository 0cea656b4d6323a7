"""Derivatives of the ops, written with the ops themselves: they run on every device and under torch.compile."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

from .bundle import layers_of
from .cpu import torch_private
from .grouped import with_tokens
from .layer import Layer
from .reference import compute_dtype, linear_formula, transform_formula


def _transform_setup(ctx: Any, inputs: tuple, output: torch.Tensor | None = None) -> None:
    _, ctx.incoherence, ctx.seed, ctx.transpose = inputs


def _transform_backward(ctx: Any, grad: torch.Tensor) -> tuple:
    # Q is orthogonal: the derivative of Q x is Qᵀ.
    return torch.ops.quip.transform(grad, ctx.incoherence, ctx.seed, not ctx.transpose), None, None, None


def _linear_setup(ctx: Any, inputs: tuple, output: torch.Tensor | None = None) -> None:
    x, *arguments = inputs
    layer = Layer(*arguments)
    ctx.names = (layer.codebook, layer.incoherence_in, layer.incoherence_out, layer.seed)
    ctx.bias_dtype = None if layer.bias is None else layer.bias.dtype
    ctx.save_for_backward(x, layer.su, layer.sv, *layer.weight)


def _linear_backward(ctx: Any, grad: torch.Tensor, needed: tuple[bool, ...] | None = None) -> tuple:
    """The gradients with respect to x, su, sv and bias. Stored tensors get none: codes are integers."""
    x, su, sv, *stored = ctx.saved_tensors
    if needed is None:
        needed = tuple(ctx.needs_input_grad[i] for i in (0, 2, 3, 4))
    needs_x, needs_su, needs_sv, needs_bias = needed
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


def _grouped_linear_setup(ctx: Any, inputs: tuple, output: torch.Tensor | None = None) -> None:
    _, ends, weight, su, sv, *ctx.names = inputs
    ctx.save_for_backward(ends, su, sv, *weight)


def _grouped_linear_backward(ctx: Any, grad: torch.Tensor) -> tuple:
    """The gradient with respect to x."""
    ends, su, sv, *weight = ctx.saved_tensors
    grad_x = torch.ops.quip.grouped_linear_backward(grad, ends, weight, su, sv, *ctx.names)
    return grad_x, None, [None] * len(weight), *[None] * 6


class _Linear(torch.autograd.Function):
    """quip::linear with a graph. Its inputs are the op's, with the list of stored tensors at the end."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *arguments: Any) -> torch.Tensor:
        inputs = _in_order(x, *arguments)
        _linear_setup(ctx, inputs)
        return _linear_below(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple:
        needed = ctx.needs_input_grad
        grad_x, stored, *others = _linear_backward(ctx, grads[0], (needed[0], *needed[1:4]))
        return grad_x, *others, *stored


class _Transform(torch.autograd.Function):
    """quip::transform with a graph."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> torch.Tensor:
        _transform_setup(ctx, inputs)
        return _transform_below(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple:
        return _transform_backward(ctx, grads[0])


class _GroupedLinear(torch.autograd.Function):
    """quip::grouped_linear with a graph for the derivative with respect to x."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, ends: torch.Tensor, *arguments: Any) -> torch.Tensor:
        *names, su, sv = arguments[:6]
        inputs = (x, ends, list(arguments[6:]), su, sv, *names)
        _grouped_linear_setup(ctx, inputs)
        return _grouped_linear_below(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple:
        grad_x, _, stored, *others = _grouped_linear_backward(ctx, grads[0])
        return grad_x, None, *others, *stored


def _in_order(x: torch.Tensor, *others: Any) -> tuple:
    """The op's arguments: the stored tensors, which come last, are its second."""
    count = len(Layer._fields) - 1
    return x, list(others[count:]), *others[:count]


def _linear_below(*inputs: Any) -> torch.Tensor:
    with torch_private.below_autograd():
        return torch.ops.quip.linear.default(*inputs)


def _grouped_linear_below(*inputs: Any) -> torch.Tensor:
    with torch_private.below_autograd():
        return torch.ops.quip.grouped_linear.default(*inputs)


def _transform_below(*inputs: Any) -> torch.Tensor:
    with torch_private.below_autograd():
        return torch.ops.quip.transform.default(*inputs)


def _linear(
    x: torch.Tensor, weight: list[torch.Tensor], su: torch.Tensor, sv: torch.Tensor, bias: torch.Tensor | None, *names: Any
) -> torch.Tensor:
    """quip::linear above its kernels, with derivatives if they are needed.

    In forward mode and in function transforms (torch.func), PyTorch differentiates the formula: the op is linear in x, and
    in each of su, sv and bias.
    """
    if torch.is_grad_enabled() or torch_private.may_be_dual():  # the usual call needs neither
        floats = (x, su, sv) if bias is None else (x, su, sv, bias)
        if _wants_formula(floats):
            layer = Layer(weight, su, sv, bias, *names)
            decoded = torch.ops.quip.decode(weight, layer.codebook, layer.m, layer.n, compute_dtype(x.dtype))
            return linear_formula(x, layer, decoded)
        if torch.is_grad_enabled() and any(v.requires_grad for v in floats):
            return _Linear.apply(x, su, sv, bias, *names, *weight)
    with torch_private.below_autograd():
        return torch.ops.quip.linear.default(x, weight, su, sv, bias, *names)


def _transform(x: torch.Tensor, incoherence: str, seed: int, transpose: bool) -> torch.Tensor:
    """quip::transform above its kernels; see [`_linear`]."""
    if _wants_formula((x,)):
        return transform_formula(x, incoherence, seed, transpose).clone()
    if torch.is_grad_enabled() and x.requires_grad:
        return _Transform.apply(x, incoherence, seed, transpose)
    return _transform_below(x, incoherence, seed, transpose)


def _grouped_linear(
    x: torch.Tensor, ends: torch.Tensor, weight: list[torch.Tensor], su: torch.Tensor, sv: torch.Tensor, *names: Any
) -> torch.Tensor:
    """quip::grouped_linear above its kernels; see [`_linear`]. Derivatives for su and sv are those of single linears."""
    if torch.is_grad_enabled() or torch_private.may_be_dual():
        needs_scales = torch.is_grad_enabled() and (su.requires_grad or sv.requires_grad)
        if needs_scales or _wants_formula((x, su, sv)):
            linear = torch.ops.quip.linear
            parts = [
                linear(x[begin:end], [w[expert] for w in weight], su[expert], sv[expert], None, *names)
                for expert, begin, end in with_tokens([int(end) for end in ends.unbind()])  # tensors of torch.func
            ]
            rest = x.new_zeros((x.shape[0] - sum(map(len, parts)), sv.shape[-1]))
            return torch.cat([*parts, rest])
        if torch.is_grad_enabled() and x.requires_grad:
            return _GroupedLinear.apply(x, ends, *names, su, sv, *weight)
    return _grouped_linear_below(x, ends, weight, su, sv, *names)


def _bundle(
    x: torch.Tensor, weight: list[torch.Tensor], su: list[torch.Tensor], sv: list[torch.Tensor], linears: str
) -> torch.Tensor:
    """quip::bundle above its kernels; derivatives are those of single linears."""
    if torch.is_grad_enabled() or torch_private.may_be_dual():
        floats = (x, *su, *sv)
        if _wants_formula(floats) or (torch.is_grad_enabled() and any(v.requires_grad for v in floats)):
            layers = layers_of(weight, su, sv, linears)
            return torch.cat([torch.ops.quip.linear(x, *layer) for layer in layers], dim=-1)
    with torch_private.below_autograd():
        return torch.ops.quip.bundle.default(x, weight, su, sv, linears)


def _wants_formula(tensors: tuple[torch.Tensor, ...]) -> bool:
    """Whether derivatives of these are needed that an `autograd.Function` does not give."""
    if torch_private.may_be_dual() and any(forward_ad.unpack_dual(v).tangent is not None for v in tensors):
        return True
    return torch_private.is_transformed() and torch.is_grad_enabled() and any(v.requires_grad for v in tensors)


_library: list[torch.library.Library] = []  # kept alive: registrations vanish with their library


def register() -> None:
    """Register the derivatives of quip::transform, linear, bundle and grouped_linear; quip::decode has none.

    If PyTorch lacks a function that forward mode needs (see `cpu.torch_private`), only backward mode is registered, and
    quip::bundle has no derivatives.
    """
    if not torch_private.is_usable():
        torch.library.register_autograd("quip::transform", _transform_backward, setup_context=_transform_setup)
        torch.library.register_autograd("quip::linear", _linear_backward, setup_context=_linear_setup)
        torch.library.register_autograd(
            "quip::grouped_linear", _grouped_linear_backward, setup_context=_grouped_linear_setup
        )
        return
    library = torch.library.Library("quip", "FRAGMENT")
    library.impl("linear", _linear, "Autograd")
    library.impl("bundle", _bundle, "Autograd")
    library.impl("transform", _transform, "Autograd")
    library.impl("grouped_linear", _grouped_linear, "Autograd")
    _library.append(library)
