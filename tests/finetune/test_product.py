"""Gradients of the products while tuning: against finite differences in float64, and compiled."""

from __future__ import annotations

import pytest
import torch

from tests.finetune.conftest import IDS, pair
from transformers_quip.finetune import student as module
from transformers_quip.finetune.head import hidden_states
from transformers_quip.finetune.product import FrozenProduct
from transformers_quip.finetune.student import TunedLinear, tuned
from transformers_quip.nn import QuipLinear


def numbers(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


def test_the_product():
    x, weight = numbers(2, 3, 5).requires_grad_(), numbers(4, 5)
    assert torch.autograd.gradcheck(lambda t: FrozenProduct.apply(t, weight), x)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_a_tuned_linear(monkeypatch, bias, shared):
    """With respect to the input, both multipliers and the bias; Ŵ is the decoded weight in float64."""
    monkeypatch.setattr(module, "product_dtype", lambda device: torch.float64)
    quantized = QuipLinear(24, 16, bias, seed=3, dtype=torch.float64)
    for tensor in quantized.parameters():
        tensor.data = numbers(*tensor.shape) if tensor.is_floating_point() else torch.randint_like(tensor, 0, 9999)
    b = torch.nn.Parameter(numbers(24)) if shared else None
    linear = TunedLinear(quantized, b).double()
    x = numbers(2, 3, 24).requires_grad_()
    with torch.no_grad():
        linear.a.copy_(numbers(16))
        scaled = x if b is None else x * b
        weight = linear.a[:, None] * quantized.dequantize(torch.float32).double()
        expected = scaled @ weight.T + (0 if linear.bias is None else linear.bias)
    torch.testing.assert_close(linear(x), expected)
    if bias:
        linear.bias.requires_grad_()
    inputs = [x, linear.a, *([b] if shared else []), *([linear.bias] if bias else [])]
    assert torch.autograd.gradcheck(lambda *_: linear(x), inputs)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_compiled_student_has_the_same_gradients(arch):
    _, model = pair(arch)
    with tuned(model, IDS[:1]) as student:
        found = []
        for run in (hidden_states, torch.compile(hidden_states, backend="aot_eager")):
            loss = run(model, IDS[:4]).square().mean()
            found.append(torch.autograd.grad(loss, list(student.trained().values())))
        for name, eager, compiled in zip(student.trained(), *found, strict=True):
            torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
