"""Whoever records operations sees the op: the recorded program computes the right values for another input."""

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

from tests import truth
from transformers_quip import QuipLinear
from transformers_quip.nn.fused import FusedRows, Fusion


class Model(nn.Module):
    """A quantized linear, two that are stored as one, and a write to their input in between."""

    def __init__(self, writes=False):
        super().__init__()
        tensors = truth.random_linear(12, 24)
        self.up = QuipLinear(24, 12)
        self.up.load_state_dict(tensors)
        self.weight, self.bias = truth.dense_weight(tensors["codes"], tensors["su"], tensors["sv"]), tensors["bias"]
        tensors = truth.random_linear(12, 12, seed=1)
        del tensors["bias"]
        self.qk = QuipLinear(12, 12, bias=False)
        self.qk.load_state_dict(tensors)
        self.fused = truth.dense_weight(self.qk.codes, self.qk.su, self.qk.sv)
        fusion = Fusion(self, "qk", 2)
        self.q, self.k = FusedRows(fusion, 0, 8), FusedRows(fusion, 8, 12)
        self.writes = writes
        self.requires_grad_(False).eval()

    def forward(self, x):
        h = self.up(x).sin()
        q = self.q(h)
        if self.writes:
            h.mul_(2)
        return torch.cat([q, self.k(h)], -1)

    def expected(self, x):
        h = (x.double() @ self.weight.T + self.bias.double()).sin()
        return torch.cat([h @ self.fused[:8].T, (2 if self.writes else 1) * (h @ self.fused[8:].T)], -1)


def vectors(count=3, seed=1):
    return torch.randn(count, 24, generator=torch.Generator().manual_seed(seed))


def close(y, expected):
    torch.testing.assert_close(y.double(), expected, rtol=1e-3, atol=1e-2)


@pytest.fixture(params=[False, True], ids=["pure", "writes"])
def model(request):
    model = Model(request.param)
    with torch.no_grad():  # prepares the linears
        for _ in range(2):
            close(model(vectors()), model.expected(vectors()))
    return model


CONTEXTS = [torch.no_grad, torch.inference_mode, torch.enable_grad]


@pytest.mark.parametrize("context", CONTEXTS)
def test_jit_trace(model, context):
    with context():
        traced = torch.jit.trace(model, (vectors(),), check_trace=False)
    assert "quip::linear" in str(traced.inlined_graph)
    for count in (3, 1, 5, 80):
        other = vectors(count, seed=2)
        close(traced(other), model.expected(other))


def test_jit_trace_of_one_that_was_not_called_before():
    model = Model()
    with torch.no_grad():
        traced = torch.jit.trace(model, (vectors(),))
    close(traced(vectors(4, seed=2)), model.expected(vectors(4, seed=2)))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad])
def test_export(model, strict, context):
    count = torch.export.Dim("count", min=2, max=200)
    with context():
        program = torch.export.export(model, (vectors(),), dynamic_shapes=({0: count},), strict=strict)
        assert any("quip.linear" in str(node.target) for node in program.graph.nodes)
        for size in (3, 80):
            other = vectors(size, seed=2)
            close(program.module()(other), model.expected(other))
            close(program.run_decompositions().module()(other), model.expected(other))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@torch.no_grad()
def test_make_fx(model, mode):
    graph = make_fx(model, tracing_mode=mode, _allow_non_fake_inputs=True)(vectors())
    assert any("quip.linear" in str(node.target) for node in graph.graph.nodes)
    other = vectors(seed=2)
    close(graph(other), model.expected(other))


def test_symbolic_trace(model):
    """torch.fx cannot follow the check of the input's shape, nor what the op's arguments are: it says so."""
    try:
        graph = torch.fx.symbolic_trace(model)
    except torch.fx.proxy.TraceError as error:
        assert "symbolically traced" in str(error)  # noqa: PT017
        return
    other = vectors(seed=2)
    close(graph(other), model.expected(other))


class Names(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("recorder", [Names, Operations])
def test_modes(model, recorder, context):
    with context(), recorder() as mode:
        y = model(vectors())
    close(y, model.expected(vectors()))
    assert sum("quip" in name and "linear" in name for name in mode.names) == 3


@torch.no_grad()
def test_the_profiler(model):
    with profile() as recorded:
        y = model(vectors())
    close(y, model.expected(vectors()))
    assert any(event.key == "quip::linear" for event in recorded.key_averages())


class Doubles(TorchFunctionMode):
    """Changes the result of the op: what is not seen cannot be changed."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        y = func(*args, **(kwargs or {}))
        return 2 * y if "quip" in str(func) else y


@torch.no_grad()
def test_a_function_mode_may_change_the_result():
    model = Model()
    x = vectors()
    model.up(x)
    with Doubles():
        y = model.up(x)
    close(y, 2 * (x.double() @ model.weight.T + model.bias.double()))
    with torch.device("cpu"):  # a mode that records nothing
        close(model.up(x), x.double() @ model.weight.T + model.bias.double())


@torch.no_grad()
def test_compiled(model):
    torch._dynamo.reset()
    for backend in ("eager", "aot_eager"):
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        for seed in (1, 2):
            close(compiled(vectors(seed=seed)), model.expected(vectors(seed=seed)))
