"""PyTorch's private functions: asked inside every kind of recorder, and done without where one is missing or wrong."""

import logging
import subprocess
import sys

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

from transformers_quip.ops.cpu import torch_private

# Each is looked up when `torch_private` is imported.
NAMES = (
    "torch._C._len_torch_dispatch_stack",
    "torch._C._len_torch_function_stack",
    "torch._C._get_function_stack_at",
    "torch._C._functorch.peek_interpreter_stack",
    "torch._C._get_tracing_state",
    "torch.autograd._profiler_enabled",
    "torch._C._AutoDispatchBelowAutograd",
    "torch.autograd.forward_ad._current_level",
)


def test_this_pytorch_has_them_all():
    assert torch_private.is_usable()
    assert not torch_private.is_recorded()
    assert not torch_private.is_watched()


@pytest.mark.parametrize("recorder", [TorchDispatchMode, TorchFunctionMode, forward_ad.dual_level])
def test_modes_are_seen(recorder):
    with recorder():
        assert torch_private.is_recorded()
    assert not torch_private.is_recorded()


def test_the_profiler_is_seen():
    with profile():
        assert torch_private.is_watched()
        assert not torch_private.is_recorded()


@pytest.mark.parametrize(
    "run",
    [
        lambda f, x: torch.func.vmap(f)(x),
        lambda f, x: torch.func.grad(lambda v: f(v).sum())(x),
        lambda f, x: torch.func.jvp(f, (x,), (x,)),
        lambda f, x: torch.jit.trace(f, (x,), check_trace=False),
        lambda f, x: make_fx(f)(x),
    ],
    ids=["vmap", "grad", "jvp", "jit.trace", "make_fx"],
)
def test_transforms_and_tracers_are_seen(run):
    found = []

    def f(x):
        found.append(torch_private.is_recorded())
        return x * 2

    run(f, torch.ones(3))
    assert found
    assert all(found)


def test_a_default_device_records_nothing():
    with torch.device("cpu"):
        assert not torch_private.is_recorded()
        with TorchFunctionMode():
            assert torch_private.is_recorded()


# A wrong answer that each of the questions could give.
WRONG = {
    "torch._C._len_torch_dispatch_stack": 0,
    "torch._C._len_torch_function_stack": 0,
    "torch._C._functorch.peek_interpreter_stack": None,
    "torch._C._get_tracing_state": "a state",
    "torch.autograd._profiler_enabled": True,
}


def owner_of(name):
    path, _, attribute = name.rpartition(".")
    owner = torch
    for part in path.split(".")[1:]:
        owner = getattr(owner, part)
    return owner, attribute


@pytest.mark.parametrize("name", NAMES)
def test_one_that_is_missing_is_found_out(name, monkeypatch):
    monkeypatch.delattr(*owner_of(name))
    assert torch_private._load() is None


@pytest.mark.parametrize("name", WRONG)
def test_one_that_answers_wrongly_is_found_out(name, monkeypatch):
    monkeypatch.setattr(*owner_of(name), lambda *_: WRONG[name])
    assert torch_private._load() is None


def test_a_process_without_one_of_them():
    """As an import finds it: the op is registered without forward mode, and has its gradients."""
    code = """
import torch, torch._dynamo, torch.func, transformers
del torch._C._get_function_stack_at
from tests import truth
from transformers_quip import QuipLinear
from transformers_quip.ops.cpu import torch_private
assert not torch_private.is_usable()
module = QuipLinear(24, 12)
parts = truth.random_linear(12, 24)
module.load_state_dict(parts)
x = torch.randn(3, 24)
bias = parts.pop("bias")
weight = truth.dense_weight(**parts)
for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
    with context():
        for _ in range(2):
            assert torch.allclose(module(x).double(), x.double() @ weight.T + bias.double(), rtol=1e-3, atol=1e-3)
assert module._prepared is None
with torch.profiler.profile() as recorded, torch.no_grad():
    module(x)
assert any(event.key == "quip::linear" for event in recorded.key_averages())
x.requires_grad_()
module(x).sum().backward()
assert torch.allclose(x.grad.double(), weight.sum(0).expand(3, 24), rtol=1e-3, atol=1e-3)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_what_is_missing_is_said(monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("transformers_quip"), "propagate", True)
    monkeypatch.delattr(torch._C, "_get_tracing_state")
    with caplog.at_level(logging.WARNING, "transformers_quip"):
        assert torch_private._load() is None
    (record,) = caplog.records
    assert "_get_tracing_state" in record.getMessage()
