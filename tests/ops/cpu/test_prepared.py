"""The fast path past the dispatcher: taken only where nobody records, with the same result whatever was changed before."""

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

needs_library = pytest.mark.skipif(not cpu_kernels.is_available(), reason="the CPU library was not compiled")


@pytest.fixture
def module():
    linear = QuipLinear(24, 12)
    linear.load_state_dict(truth.random_linear(12, 24))
    return linear


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def close(module, x, accuracy=1e-5):
    y = module(x)
    assert y.dtype == x.dtype
    assert y.shape == (*x.shape[:-1], 12)
    torch.testing.assert_close(y.double(), expected_of(module, x), rtol=accuracy, atol=10 * accuracy)


def prepared_for(module, x):
    """The module's own prepared call, asked for x."""
    return None if module._prepared is None else module._prepared(x, module._parameters)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_every_call_computes_the_same(module, context):
    x = torch.randn(3, 24)
    with context():
        for _ in range(3):
            close(module, x)


def test_other_devices_go_through_the_dispatcher(module):
    with torch.no_grad():
        assert module.to("meta")(torch.empty(3, 24, device="meta")).shape == (3, 12)


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


# What is changed, and whether the prepared call sees that it has to be looked up again (in place it need not).
CHANGES = {
    "nothing": (lambda module: None, False),
    "values in place": (lambda module: module.codes.copy_(other(module, "codes")), False),
    "loaded": (lambda module: module.load_state_dict(truth.random_linear(12, 24, seed=6)), False),
    "parameter": (lambda module: setattr(module, "sv", nn.Parameter(other(module, "sv"), False)), True),
    "data": (lambda module: setattr(module.su, "data", other(module, "su")), True),
    "dtype of data": (lambda module: setattr(module.sv, "data", other(module, "sv").half()), True),
    "no bias": (lambda module: setattr(module, "bias", None), True),
    "dtype": (lambda module: module.half(), True),
    "backend": (lambda module: set_backend("reference"), True),
    "activations": (lambda module: set_activations("exact"), True),
}


@needs_library
@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_is_seen(module, usual, change):
    x = torch.randn(2, 24)
    module(x)
    alter, looked_up = CHANGES[change]
    alter(module)
    assert (prepared_for(module, x) is None) == looked_up
    for _ in range(2):
        close(module, x, 1e-3)


@needs_library
@torch.no_grad()
def test_a_bias_that_comes_later_is_seen():
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
def test_inputs_of_every_kind(codebook):
    module = QuipLinear(24, 12, codebook=codebook)
    module.load_state_dict(truth.random_linear(12, 24, codebook=codebook))
    x = torch.randn(3, 4, 48)
    first = x[..., :24].contiguous()
    close(module, first)
    for given, is_prepared in (
        (first, True),
        (first[0, 0], True),
        (x[..., :24], False),  # not contiguous
        (torch.randn(70, 24), False),  # more than are multiplied by the codes
        (first.half(), False),
        (first[:0], False),
    ):
        module(first)
        found = prepared_for(module, given)
        assert (found is not None) == is_prepared
        accuracy = 1e-5 if given.dtype == torch.float32 else 0.05
        close(module, given, accuracy)
        if found is not None:
            torch.testing.assert_close(found.double(), expected_of(module, given), rtol=accuracy, atol=10 * accuracy)
    with pytest.raises(ValueError, match=r"expected floating point \[..., 24\], got torch.float32 \[3, 25\]"):
        module(torch.randn(3, 25))
    with pytest.raises(ValueError, match="got torch.int64"):
        module(torch.ones(3, 24).long())


@needs_library
@pytest.mark.parametrize("name", ["x", "su", "sv", "bias"])
def test_where_gradients_are_on_only_a_call_that_needs_them_builds_a_graph(module, name):
    x = torch.randn(3, 24)
    for _ in range(2):
        assert module(x).grad_fn is None
    assert prepared_for(module, x) is not None
    wanted = {"x": x, **dict(module.named_parameters())}[name].requires_grad_()
    y = module(x)
    with torch.no_grad():
        assert module(x).grad_fn is None
    (found,) = torch.autograd.grad(y.sum(), wanted)
    step = torch.randn_like(wanted)
    with torch.no_grad():  # the sum is linear in each of them
        before = expected_of(module, x).sum()
        wanted += step
        change = expected_of(module, x).sum() - before
    torch.testing.assert_close((found * step).sum().double(), change, rtol=1e-3, atol=1e-3)


@needs_library
@torch.no_grad()
def test_few_and_many_vectors_of_16_bits():
    """Where the processor has AMX, both are prepared; elsewhere, those that are multiplied by the codes."""
    module = QuipLinear(96, 64, dtype=torch.bfloat16)
    module.load_state_dict(truth.random_linear(64, 96, dtype=torch.bfloat16))
    many, few = torch.randn(2, 40, 96).bfloat16(), torch.randn(3, 96).bfloat16()
    expected = [module.float()(v.float()) for v in (many, few)]
    module.bfloat16()
    for _ in range(2):
        for v, y in zip((many, few), expected, strict=True):
            assert (module(v).float() - y).norm() < 0.02 * y.norm()
    assert (prepared_for(module, many) is not None) == cpu_many.takes(torch.bfloat16, 64, 96, True)


@needs_library
@torch.no_grad()
def test_copies_are_prepared_for_themselves_and_nothing_is_kept_alive(module):
    x = torch.randn(3, 24)
    expected = module(x)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        twin.codes.copy_(other(module, "codes"))
        close(twin, x)
    assert torch.equal(module(x), expected)
    kept = weakref.ref(module.codes)
    module.codes = nn.Parameter(module.codes.clone(), requires_grad=False)
    gc.collect()
    assert kept() is None


@needs_library
@torch.no_grad()
def test_modes_and_the_profiler_see_a_layer_that_was_prepared(module):
    x = torch.randn(3, 24)
    for _ in range(2):
        with Names() as mode:
            module(x)
            assert prepared_for(module, x) is None
        with profile() as recorded:
            module(x)
        assert "quip::linear" in mode.names
        assert any(event.key == "quip::linear" for event in recorded.key_averages())
        module(x)
        assert prepared_for(module, x) is not None
    with torch.enable_grad():
        module(x.requires_grad_()).sum().backward()
    assert x.grad is not None
