"""Linears that read one input, which is written to between their calls: what each computes is that of its own input."""

import pytest
import torch
from torch import nn

from tests import truth
from tests.ops.test_same_input import WRITES
from transformers_quip import QuipLinear, set_activations
from transformers_quip.nn.fused import FusedRows, Fusion

NAMES = ("q_proj", "k_proj", "v_proj")
ROWS = {"q_proj": (0, 64), "k_proj": (64, 96), "v_proj": (96, 128)}


class Apart(nn.Module):
    """q, k and v with equal su, as quantization gives them."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        su = truth.random_linear(8, 64)["su"]
        self.dense = {}
        for seed, name in enumerate(NAMES):
            tensors = {**truth.random_linear(64, 64, seed), "su": su.clone()}
            del tensors["bias"]
            linear = QuipLinear(64, 64, bias=False, dtype=dtype)
            linear.load_state_dict(tensors)
            self.add_module(name, linear)
            self.dense[name] = truth.dense_weight(linear.codes, linear.su, linear.sv)


class Fused(nn.Module):
    """q, k and v stored as one linear, as QuIP# does."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        tensors = truth.random_linear(128, 64)
        del tensors["bias"]
        self.qkv_proj = QuipLinear(64, 128, bias=False, dtype=dtype)
        self.qkv_proj.load_state_dict(tensors)
        fusion = Fusion(self, "qkv_proj", 3)
        weight = truth.dense_weight(self.qkv_proj.codes, self.qkv_proj.su, self.qkv_proj.sv)
        self.dense = {name: weight[begin:end] for name, (begin, end) in ROWS.items()}
        for name, rows in ROWS.items():
            self.add_module(name, FusedRows(fusion, *rows))


KINDS = [Apart, Fused]
CONTEXTS = [torch.no_grad, torch.inference_mode, torch.enable_grad]
# On the CPU up to 64 vectors are multiplied by the codes, more by decoded rows, which is where inputs are shared.
COUNTS = [1, 4, 128]


@pytest.fixture(params=["exact", "int8"], autouse=True)
def activations(request):
    set_activations(request.param)
    yield request.param
    set_activations("auto")


@pytest.fixture(params=KINDS)
def module(request):
    return request.param().requires_grad_(False).eval()


def vectors(count, seed=3):
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(seed))


def check(module, name, x):
    """Raises `AssertionError` unless the linear computes what its dense weight does."""
    expected = x.detach().double() @ module.dense[name].T
    error = (getattr(module, name)(x).detach().double() - expected).norm() / expected.norm()
    # int8 costs 0.9 %; that of an old input is off by about its own size
    assert error < 0.02, f"{name}: relative error {error:.3f}"


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("write", WRITES)
def test_a_buffer_that_is_written_to_between_siblings(module, write, context, count):
    with context():
        x = vectors(count)
        check(module, "q_proj", x)
        write(x)
        check(module, "k_proj", x)
        check(module, "v_proj", x)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("write", WRITES)
def test_one_buffer_for_every_request_of_a_server(module, write, context, count):
    with context():
        x = vectors(count)
        for seed in range(3):
            if seed:
                write(x)
                x.numpy()[...] += vectors(count, seed).numpy()
            for name in NAMES:
                check(module, name, x)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("write", WRITES)
@torch.no_grad()
def test_one_linear_that_is_called_twice_with_one_buffer(module, write, count):
    x = torch.full((count, 64), 0.5)
    for name in NAMES:
        getattr(module, name)(x)
        write(x)
        check(module, name, x)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("context", CONTEXTS)
def test_an_output_that_is_changed_in_place(module, context, count):
    with context():
        x = vectors(count)
        for _ in range(2):
            for name in (*NAMES, *reversed(NAMES)):
                check(module, name, x)
                getattr(module, name)(x).zero_()


@pytest.mark.parametrize("count", COUNTS)
@torch.no_grad()
def test_su_that_is_written_to_between_siblings(count):
    module = Apart()
    x = vectors(count)
    check(module, "q_proj", x)
    for name in ("q_proj", "k_proj"):  # who computed it, and who would take it
        module.get_submodule(name).su.numpy()[...] *= -1
        module.dense[name].neg_()
        check(module, "k_proj", x)
        check(module, "v_proj", x)
        check(module, "q_proj", x)


@pytest.mark.parametrize("change", ["in place", "replaced", "data", "loaded", "numpy", "dlpack", "data in place"])
@torch.no_grad()
def test_a_fused_weight_that_changes_between_siblings(change):
    module = Fused()
    x = vectors(4)
    check(module, "q_proj", x)
    linear = module.qkv_proj
    if change == "in place":
        linear.sv.neg_()
    elif change == "replaced":
        linear.sv = nn.Parameter(-linear.sv, requires_grad=False)
    elif change == "data":
        linear.sv.data = -linear.sv
    elif change == "numpy":
        linear.sv.numpy()[:] *= -1
    elif change == "dlpack":
        torch.from_dlpack(linear.sv.detach()).neg_()
    elif change == "data in place":
        linear.sv.data.neg_()
    else:
        linear.load_state_dict({**linear.state_dict(), "sv": -linear.sv})
    module.dense["k_proj"].neg_()
    check(module, "k_proj", x)


def test_gradients_of_siblings():
    module = Fused()
    for count in COUNTS:
        x = vectors(count).requires_grad_()
        sum(getattr(module, name)(x).sum() for name in NAMES).backward()
        expected = sum(module.dense[name].sum(0) for name in NAMES).expand(count, 64)
        torch.testing.assert_close(x.grad.double(), expected, rtol=1e-3, atol=1e-2)


def test_an_input_that_begins_to_need_gradients():
    module = Fused().requires_grad_(False)
    x = vectors(4)
    module.q_proj(x)
    x.requires_grad_()
    module.k_proj(x).sum().backward()
    torch.testing.assert_close(x.grad.double(), module.dense["k_proj"].sum(0).expand(4, 64), rtol=1e-3, atol=1e-2)


def test_siblings_in_and_out_of_inference_mode():
    module = Fused().requires_grad_(False)
    x = vectors(4)
    with torch.inference_mode():
        check(module, "q_proj", x)
    x.requires_grad_()
    module.k_proj(x).square().sum().backward()
    assert x.grad is not None
