"""The way past the dispatcher: taken only where nothing watches, and the same result."""

import pytest
import torch
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

from tests import truth
from transformers_quip import QuipLinear
from transformers_quip.ops import cpu, direct


@pytest.fixture
def module():
    linear = QuipLinear(24, 12)
    linear.load_state_dict(truth.random_linear(12, 24))
    return linear


@pytest.fixture
def direct_calls(monkeypatch):
    """Counts the calls that did not go through the dispatcher (which holds the original function)."""
    counted, function = [], cpu.eager_linear
    monkeypatch.setattr(direct.cpu, "eager_linear", lambda *args: counted.append(1) or function(*args))
    return counted


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_it_is_taken_without_gradients(module, direct_calls):
    x = torch.randn(3, 24)
    expected = module(x)
    assert not direct_calls
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert torch.equal(module(x), expected)
    assert len(direct_calls) == 2


@torch.no_grad()
def test_modes_transforms_and_the_profiler_see_the_op(module, direct_calls):
    x = torch.randn(3, 24)
    with Names() as mode:
        module(x)
    assert "quip::linear" in mode.names
    with profile() as recorded:
        module(x)
    assert any(event.key == "quip::linear" for event in recorded.key_averages())
    assert not direct_calls


def test_other_devices_and_subclasses_go_through_the_dispatcher(module, direct_calls):
    with torch.no_grad():
        assert module.to("meta")(torch.empty(3, 24, device="meta")).shape == (3, 12)
    assert not direct_calls
