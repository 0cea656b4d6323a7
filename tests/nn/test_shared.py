"""Linears that read one input share its transform; the CPU stands for the GPU, and the ops compute by the reference."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests import truth
from transformers_quip import QuipLinear, set_activations
from transformers_quip.nn.shared import share_inputs
from transformers_quip.ops import Layer, backend, packing

ROWS = {"q_proj": 64, "k_proj": 32, "v_proj": 32, "o_proj": 64}


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch):
    monkeypatch.setattr(packing, "DEVICES", ("cpu",))
    monkeypatch.setitem(backend._chosen, "backend", "triton")
    monkeypatch.setitem(backend._chosen, "activations", "auto")


class Counts(TorchDispatchMode):
    """Calls of our ops by name."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().startswith("quip::"):
            self.calls.append(func.name().removeprefix("quip::"))
        return func(*args, **(kwargs or {}))

    def __call__(self, name):
        return self.calls.count(name)


class Attention(nn.Module):
    """Four linears with equal su, of which three read one input."""

    def __init__(self):
        super().__init__()
        self.dense = {}
        su = truth.random_linear(8, 64)["su"]
        for seed, (name, rows) in enumerate(ROWS.items()):
            tensors = {**truth.random_linear(rows, 64, seed), "su": su.clone()}
            linear = QuipLinear(64, rows)
            linear.load_state_dict(tensors)
            self.add_module(name, linear)
            self.dense[name] = truth.dense_weight(tensors["codes"], su, tensors["sv"]), tensors["bias"].double()

    def forward(self, x):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return torch.cat([q, k, v, self.o_proj(q)], -1)

    def expected(self, x):
        def linear(name, x):
            weight, bias = self.dense[name]
            return x.double() @ weight.T + bias

        q, k, v = (linear(name, x) for name in ("q_proj", "k_proj", "v_proj"))
        return torch.cat([q, k, v, linear("o_proj", q)], -1)


@pytest.fixture
def module():
    module = Attention()
    assert share_inputs(module) == [("q_proj", "k_proj", "v_proj")]
    return module


def vectors(*shape, seed=5):
    return torch.randn(*shape, 64, generator=torch.Generator().manual_seed(seed))


def close(y, expected):
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-2)
    return True


@torch.no_grad()
def test_one_transform_for_three_linears(module):
    x = vectors(2, 3)
    with Counts() as counts:
        y = module(x)
    assert close(y, module.expected(x))
    assert (counts("rotate"), counts("rotated_linear"), counts("linear")) == (1, 3, 1)  # o_proj reads another input
    assert module.q_proj._shared._held is None


@torch.no_grad()
def test_another_input_is_transformed_again(module):
    x, other = vectors(2), vectors(2, seed=6)
    with Counts() as counts:
        found = {name: getattr(module, name)(v) for name, v in (("q_proj", x), ("k_proj", other), ("v_proj", x))}
    assert counts("rotate") == 3
    for name, v in (("q_proj", x), ("k_proj", other), ("v_proj", x)):
        weight, bias = module.dense[name]
        assert close(found[name], v.double() @ weight.T + bias)


@torch.no_grad()
def test_a_changed_input_is_transformed_again(module):
    x = vectors(2)
    module.q_proj(x)
    x.mul_(2)
    weight, bias = module.dense["k_proj"]
    assert close(module.k_proj(x), x.double() @ weight.T + bias)
    with torch.inference_mode():  # where changes are not counted
        x = vectors(2)
        module.q_proj(x)
        x.mul_(2)
        assert close(module.k_proj(x), x.double() @ weight.T + bias)


@torch.no_grad()
def test_another_setting_is_another_input(module):
    x = vectors(2)
    module.q_proj(x)
    set_activations("int8")
    with Counts() as counts:
        module.k_proj(x)
    assert counts("rotate") == 1


@pytest.mark.parametrize("change", ["in place", "replaced", "loaded", "in place and moved"])
@torch.no_grad()
def test_a_linear_whose_su_changes_computes_for_itself(module, change):
    linear = module.k_proj
    if change.startswith("in place"):
        linear.su.neg_()
    elif change == "replaced":
        linear.su = nn.Parameter(-linear.su, requires_grad=False)
    else:
        linear.load_state_dict({**linear.state_dict(), "su": -linear.su})
    if change == "in place and moved":
        module.to("cpu")
    weight, bias = module.dense["k_proj"]
    x = vectors(2)
    for _ in range(2):
        y = module(x)
        assert close(y[:, 64:96], -(x.double() @ weight.T) + bias)
        assert close(y[:, :64], module.expected(x)[:, :64])
    assert share_inputs(module) == [("q_proj", "v_proj")]


@torch.no_grad()
def test_copies_and_changes_of_the_dtype_share_too(module):
    module.q_proj(vectors(2))  # leaves something behind
    for other in (copy.deepcopy(module), copy.deepcopy(module).bfloat16()):
        assert other.q_proj._shared is other.v_proj._shared
        assert other.q_proj._shared is not module.q_proj._shared
        assert other.q_proj._shared._held is None
        x = vectors(3).to(other.q_proj.su.dtype)
        with Counts() as counts:
            other(x)
        assert counts("rotate") == 1


def test_with_gradients_each_is_one_op(module):
    x = vectors(2).requires_grad_()
    with Counts() as counts:
        y = module(x)
    assert (counts("rotate"), counts("linear")) == (0, 4)
    y.sum().backward()
    assert x.grad is not None


@torch.no_grad()
def test_threads_do_not_see_each_others_inputs(module):
    wrong = []

    def run(seed):
        for _ in range(20):
            x = vectors(1, seed=seed)
            if not torch.allclose(module(x).double(), module.expected(x), rtol=1e-4, atol=1e-2):
                wrong.append(seed)

    threads = [threading.Thread(target=torch.no_grad()(run), args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@torch.no_grad()
def test_elsewhere_than_on_a_gpu_nothing_changes(module, monkeypatch):
    monkeypatch.setattr(packing, "DEVICES", ("cuda", "xpu"))
    x = vectors(2)
    with Counts() as counts:
        assert close(module(x), module.expected(x))
    assert (counts("rotate"), counts("linear")) == (0, 4)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_compiled_graph_has_one_transform(module, context):
    graphs = []
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend=lambda graph, inputs: graphs.append(graph) or graph)
    with context():
        for x in (vectors(2), vectors(2, seed=6)):
            assert close(compiled(x), module.expected(x))
    (graph,) = graphs
    names = [str(node.target) for node in graph.graph.nodes if "quip" in str(node.target)]
    assert sorted(names) == ["quip.linear"] + ["quip.rotate"] + ["quip.rotated_linear"] * 3
    assert module.q_proj._shared._held is None


@pytest.mark.slow  # compiles C++
@torch.no_grad()
def test_compiled_by_inductor(module):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: module(x.sin()).cos(), fullgraph=True)
    for x in (vectors(70), vectors(70, seed=6)):
        assert close(compiled(x), module.expected(x.sin()).cos())


def test_opcheck():
    parts = truth.random_linear(24, 64)
    x = vectors(2, 3)
    layer = Layer(truth.weight(parts), parts["su"], parts["sv"], parts["bias"], "e8p", "hadamard", "hadamard", 0)
    for activations in ("auto", "reference"):
        torch.library.opcheck(torch.ops.quip.rotate.default, (x, parts["su"], "e8p", "hadamard", 0, activations))
        rotated = torch.ops.quip.rotate(x, parts["su"], "e8p", "hadamard", 0, activations)
        torch.library.opcheck(torch.ops.quip.rotated_linear.default, (x, rotated, *layer))


def test_linears_that_differ_are_not_put_together():
    module = Attention()
    module.k_proj.seed = 1
    assert share_inputs(module) == [("q_proj", "v_proj")]
    module.v_proj.to("meta")
    assert share_inputs(module) == []
