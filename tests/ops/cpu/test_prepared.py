"""The way past the dispatcher: taken only where nothing watches, and the same result, whatever was changed before."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

from quip_kernels import cpu as cpu_kernels
from quip_kernels import cpu_many
from tests import truth
from transformers_quip import QuipLinear, incoherence, set_activations, set_backend
from transformers_quip.ops.cpu import prepared
from transformers_quip.ops.cpu import run as cpu

needs_library = pytest.mark.skipif(not cpu_kernels.is_available(), reason="the CPU library was not compiled")


@pytest.fixture
def module():
    linear = QuipLinear(24, 12)
    linear.load_state_dict(truth.random_linear(12, 24))
    return linear


@pytest.fixture
def direct_calls(monkeypatch):
    """Counts the calls that did not go through the dispatcher (which holds the original function)."""
    counted, function, original = [], cpu.eager_linear, prepared.Prepared.__call__

    def call(self, *args):
        y = original(self, *args)
        if y is not None:
            counted.append("prepared")
        return y

    monkeypatch.setattr(prepared.cpu, "eager_linear", lambda *args: counted.append("looked up") or function(*args))
    monkeypatch.setattr(prepared.Prepared, "__call__", call)
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
    assert direct_calls == ["looked up", "prepared" if cpu_kernels.is_available() else "looked up"]


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


def expected_of(module, x):
    parts = {name: v.double() if v.is_floating_point() else v for name, v in module._parameters.items() if v is not None}
    names = (module.incoherence_in, module.incoherence_out)
    q_in, q_out = (incoherence.get(*pair, module.seed).matrix() for pair in zip(names, (24, 12), strict=True))
    weight = truth.decode(**truth.stored(parts), columns=24, codebook=module.codebook)
    return (x.double() * parts["su"]) @ q_in @ weight.T @ q_out.T * parts["sv"] + parts.get("bias", 0)


@pytest.fixture
def usual():
    yield
    set_backend("auto")
    set_activations("auto")


def other(module, name):
    """Other values of the shape and dtype of a parameter."""
    v = module._parameters[name]
    return truth.random_linear(12, 24, seed=5)[name].to(v.dtype)


CHANGES = {
    "nothing": (lambda module: None, "prepared"),
    "values in place": (lambda module: module.codes.copy_(other(module, "codes")), "prepared"),
    "loaded": (lambda module: module.load_state_dict(truth.random_linear(12, 24, seed=6)), "prepared"),
    "parameter": (lambda module: setattr(module, "sv", nn.Parameter(other(module, "sv"), False)), "looked up"),
    "data": (lambda module: setattr(module.su, "data", other(module, "su")), "looked up"),
    "dtype of data": (lambda module: setattr(module.sv, "data", other(module, "sv").half()), "looked up"),
    "no bias": (lambda module: setattr(module, "bias", None), "looked up"),
    "dtype": (lambda module: module.half(), "looked up"),
    "backend": (lambda module: set_backend("reference"), "looked up"),
    "activations": (lambda module: set_activations("exact"), "looked up"),
}


@needs_library
@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_is_seen(module, direct_calls, usual, change):
    x = torch.randn(2, 24)
    module(x)
    alter, way = CHANGES[change]
    alter(module)
    for expected_way in (way, "looked up" if change == "backend" else "prepared"):
        torch.testing.assert_close(module(x).double(), expected_of(module, x), rtol=1e-3, atol=1e-3)
        assert direct_calls[-1] == expected_way


@needs_library
@torch.no_grad()
def test_a_bias_that_comes_later_is_seen(direct_calls):
    module = QuipLinear(24, 12, bias=False)
    parts = truth.random_linear(12, 24)
    bias = parts.pop("bias")
    module.load_state_dict(parts)
    x = torch.randn(2, 24)
    without = module(x)
    module.bias = nn.Parameter(bias, requires_grad=False)
    torch.testing.assert_close(module(x), without + bias)


@needs_library
@torch.no_grad()
@pytest.mark.parametrize("codebook", ["e8p", "e8p-rvq3", "e8p-rvq4"])
def test_inputs_of_every_kind(direct_calls, codebook):
    module = QuipLinear(24, 12, codebook=codebook)
    module.load_state_dict(truth.random_linear(12, 24, codebook=codebook))
    x = torch.randn(3, 4, 48)
    first = x[..., :24].contiguous()
    for given, way in (
        (first, "looked up"),
        (first, "prepared"),
        (first[0, 0], "prepared"),
        (x[..., :24], "looked up"),  # not contiguous
        (torch.randn(70, 24), "looked up"),  # more than are multiplied by the codes
        (first, "prepared"),
        (first.half(), "looked up"),
        (first, "looked up"),
        (first[:0], "looked up"),
    ):
        y = module(given)
        assert y.dtype == given.dtype
        assert y.shape == (*given.shape[:-1], 12)
        accuracy = 1e-5 if given.dtype == torch.float32 else 0.05
        torch.testing.assert_close(y.double(), expected_of(module, given), rtol=accuracy, atol=10 * accuracy)
        assert direct_calls[-1] == way
    with pytest.raises(ValueError, match=r"expected floating point \[..., 24\], got torch.float32 \[3, 25\]"):
        module(torch.randn(3, 25))
    with pytest.raises(ValueError, match="got torch.int64"):
        module(torch.ones(3, 24).long())


@needs_library
@torch.no_grad()
def test_many_vectors_are_prepared_where_they_are_one_call(direct_calls):
    module = QuipLinear(96, 64, dtype=torch.bfloat16)
    module.load_state_dict(truth.random_linear(64, 96, dtype=torch.bfloat16))
    many, few = torch.randn(2, 40, 96).bfloat16(), torch.randn(3, 96).bfloat16()
    expected = [module.float()(v.float()) for v in (many, few)]
    module.bfloat16()
    direct_calls.clear()
    for _ in range(2):
        for v, y in zip((many, few), expected, strict=True):
            assert (module(v).float() - y).norm() < 0.02 * y.norm()
    second = "prepared" if cpu_many.takes(torch.bfloat16, 64, 96, True) else "looked up"
    assert direct_calls == ["looked up", "prepared" if second == "prepared" else "looked up", second, "prepared"]


@needs_library
@torch.no_grad()
def test_copies_are_prepared_for_themselves_and_nothing_is_kept_alive(module, direct_calls):
    x = torch.randn(3, 24)
    expected = module(x)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        twin.codes.copy_(other(module, "codes"))
        assert not torch.equal(twin(x), expected)
        assert direct_calls[-1] == "looked up"
    assert torch.equal(module(x), expected)
    kept = weakref.ref(module.codes)
    module.codes = nn.Parameter(module.codes.clone(), requires_grad=False)
    gc.collect()
    assert kept() is None


@needs_library
@torch.no_grad()
def test_modes_and_the_profiler_see_a_layer_that_was_prepared(module, direct_calls):
    x = torch.randn(3, 24)
    module(x)
    module(x)
    assert direct_calls == ["looked up", "prepared"]
    with Names() as mode:
        module(x)
    with profile() as recorded:
        module(x)
    assert "quip::linear" in mode.names
    assert any(event.key == "quip::linear" for event in recorded.key_averages())
    with torch.enable_grad():
        module(x.requires_grad_()).sum().backward()
    assert x.grad is not None
    assert direct_calls == ["looked up", "prepared"]
