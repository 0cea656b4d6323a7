"""Equal calls in one graph: computed once, and only if nothing was written to in between."""

from __future__ import annotations

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.fx.experimental.proxy_tensor import make_fx

from tests import truth
from transformers_quip.ops import graph
from transformers_quip.ops.cpu import torch_private

MODES = [torch.no_grad, torch.inference_mode, torch.enable_grad]
ROWS, COLUMNS = 48, 64


@pytest.fixture
def tensors():
    return truth.random_linear(ROWS, COLUMNS)


@pytest.fixture
def linear(tensors):
    def call(x):
        vectors = (tensors[name] for name in ("su", "sv", "bias"))
        return torch.ops.quip.linear(x, [tensors["codes"]], *vectors, "e8p", "hadamard", "hadamard", 0)

    return call


@pytest.fixture
def compiled():
    """Compiles a function without graph break, and counts its calls of quip::linear in every graph."""
    counts = []

    def compiler(graph, inputs):
        counts.append(sum("quip.linear" in str(node.target) for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    def call(function, x):
        torch._dynamo.reset()
        backend = aot_autograd(fw_compiler=compiler, bw_compiler=compiler)
        return torch.compile(function, fullgraph=True, backend=backend)(x), counts

    return call


def expected(tensors, x):
    weight = truth.dense_weight(tensors["codes"], tensors["su"], tensors["sv"])
    return (x.double() @ weight.T + tensors["bias"]).float()


def some_x():
    return torch.randn(3, COLUMNS, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("mode", MODES)
def test_equal_calls_are_one(mode, linear, compiled, tensors):
    with mode():
        y, counts = compiled(lambda x: linear(x)[:, :8] - 2 * linear(x)[:, 8:16], some_x())
    z = expected(tensors, some_x())
    torch.testing.assert_close(y, z[:, :8] - 2 * z[:, 8:16], rtol=1e-4, atol=1e-3)
    assert counts == [1]


def double(x):
    x.mul_(2)


def double_data(x):
    x.data.mul_(2)


def double_a_view(x):
    x.view(-1)[:].mul_(2)


def double_by_numpy(x):
    array = x.detach().numpy()
    array *= 2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("is_input", [False, True])
@pytest.mark.parametrize("write", [double, double_data, double_a_view, double_by_numpy])
def test_a_write_between_two_calls_is_seen(write, is_input, mode, linear, compiled, tensors):
    def function(x):
        x = x if is_input else x + 0
        y = linear(x)
        write(x)
        return y, linear(x)

    with mode():
        (y, z), counts = compiled(function, some_x())
    torch.testing.assert_close(y, expected(tensors, some_x()), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(z, expected(tensors, 2 * some_x()), rtol=1e-4, atol=1e-3)
    assert counts == [2]


@torch.no_grad()
def test_a_write_to_a_weight_is_seen(linear, compiled, tensors):
    def function(x):
        y = linear(x)
        tensors["sv"].mul_(3)
        return y, linear(x)

    before = expected(tensors, some_x())
    (y, z), counts = compiled(function, some_x())
    torch.testing.assert_close(y, before, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(z, expected(tensors, some_x()), rtol=1e-4, atol=1e-3)
    assert counts == [2]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("inside", [False, True])
def test_results_share_no_memory(inside, mode, linear, compiled, tensors):
    def function(x):
        y, z = linear(x), linear(x)
        if inside:
            y.zero_()
        return y, z

    with mode():
        (y, z), counts = compiled(function, some_x())
        y.zero_()
    torch.testing.assert_close(z, expected(tensors, some_x()), rtol=1e-4, atol=1e-3)
    assert counts == [1]


def test_gradients(linear, compiled, tensors):
    x = some_x().requires_grad_()
    y, counts = compiled(lambda x: linear(x)[:, :8].sum() + 2 * linear(x)[:, 8:16].sum(), x)
    y.backward()
    weight = truth.dense_weight(tensors["codes"], tensors["su"], tensors["sv"])
    gradient = weight[:8].sum(0) + 2 * weight[8:16].sum(0)
    torch.testing.assert_close(x.grad, gradient.float().expand(3, COLUMNS), rtol=1e-4, atol=1e-3)
    assert counts[0] == 1


@torch.no_grad()
def test_different_calls_stay(linear, compiled, tensors):
    y, counts = compiled(lambda x: linear(x) + linear(x + 1), some_x())
    z = expected(tensors, some_x()) + expected(tensors, some_x() + 1)
    torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-3)
    assert counts == [2]


@torch.no_grad()
def test_graphs_with_writes_are_left_alone(linear, tensors):
    def function(x):
        y, z = linear(x), linear(x)
        y.zero_()
        return z

    made = make_fx(function)(some_x())
    torch.testing.assert_close(made(some_x()), expected(tensors, some_x()), rtol=1e-4, atol=1e-3)
    assert sum("quip.linear" in str(node.target) for node in made.graph.nodes) == 2


def test_nothing_is_registered_for_a_pytorch_without_the_modes(monkeypatch):
    monkeypatch.setattr(torch_private, "graph_modes", lambda: None)
    monkeypatch.setattr(torch.library, "register_torch_dispatch", lambda *_: pytest.fail("registered"))
    graph.register()
