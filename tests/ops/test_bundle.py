"""torch.ops.quip.bundle: values against dense float64 formulas, one rotation for equal su, derivatives, compiled graphs."""

import pytest
import torch

import transformers_quip  # noqa: F401 - registers the ops
from tests import truth
from transformers_quip import incoherence
from transformers_quip.ops import backend
from transformers_quip.ops.bundle import Form, described, joined, layers_of, rotation
from transformers_quip.ops.cpu import run

N, ROWS = 32, (16, 48, 32)


def arguments(codebooks=("e8p",) * 3, dtype=torch.float32, shape=(2, 3), one_su=True):
    parts = [
        truth.random_linear(m, N, seed, dtype, book) for seed, (m, book) in enumerate(zip(ROWS, codebooks, strict=True))
    ]
    weight = [tensor for part in parts for name, tensor in part.items() if name.startswith("codes")]
    su = [parts[0 if one_su else i]["su"] for i in range(3)]
    x = torch.randn(*shape, N, generator=torch.Generator().manual_seed(9)).to(dtype)
    forms = [Form(book, "hadamard", out, 0) for book, out in zip(codebooks, ("hadamard", "none", "hadamard"), strict=True)]
    return [x, weight, su, [part["sv"] for part in parts], described(forms)]


def expected(x, *others):
    """Each linear by the formula, with its decoded weight in float64."""
    outputs = []
    for layer in layers_of(*others):
        q_in, q_out = (
            incoherence.get(name, size).matrix()
            for name, size in ((layer.incoherence_in, N), (layer.incoherence_out, layer.m))
        )
        stored = dict(zip(layer.book.tensors(layer.m, N), layer.weight, strict=True))
        decoded = truth.decode(stored.pop("codes"), N, layer.codebook, **stored)
        outputs.append(x.double() @ (layer.sv.double()[:, None] * (q_out @ decoded @ q_in.T) * layer.su.double()).T)
    return torch.cat(outputs, -1)


@pytest.fixture(params=["auto", "reference"])
def implementation(request):
    with backend.overridden(backend=request.param):
        yield request.param


@pytest.mark.parametrize("one_su", [True, False])
@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (200,), (0,)])
def test_it_is_the_formula(shape, one_su, implementation):
    args = arguments(shape=shape, one_su=one_su)
    y = torch.ops.quip.bundle(*args)
    assert y.shape == (*shape, sum(ROWS))
    torch.testing.assert_close(y.double(), expected(*args), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("shape", [(2,), (100,)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype, shape, implementation):
    args = arguments(dtype=dtype, shape=shape)
    args[3] = [v / 20 for v in args[3]]  # keep float16 in its range
    y, wanted = torch.ops.quip.bundle(*args), expected(*args)
    assert y.dtype == dtype
    assert (y.double() - wanted).norm() < (1e-6 if dtype == torch.float64 else 0.02) * wanted.norm()


@pytest.mark.parametrize("books", [("e8p-rvq4", "scalar3", "e8p"), ("trellis:3inst:k2:qtip", "e8p-rvq3", "d4")])
@pytest.mark.parametrize("shape", [(3,), (100,)])
def test_linears_of_different_codebooks(books, shape, implementation):
    args = arguments(books, shape=shape)
    torch.testing.assert_close(torch.ops.quip.bundle(*args).double(), expected(*args), rtol=1e-4, atol=1e-3)


def test_many_vectors_are_rotated_once_for_equal_su(monkeypatch):
    counts = []
    for one_su in (True, False):
        calls, original = [], run.rotated
        monkeypatch.setattr(run, "rotated", lambda *a, calls=calls, original=original: calls.append(1) or original(*a))
        torch.ops.quip.bundle(*arguments(shape=(100,), one_su=one_su))
        counts.append(len(calls))
    assert counts == [1, 3]


def test_the_reference_rotates_once_too():
    x, *others = arguments()
    rotated = []
    joined(x, layers_of(*others), rotation, rotated.append, lambda t, layer: x.new_zeros(*x.shape[:-1], layer.m))
    assert len(rotated) == 1


def test_a_linear_before_and_after_is_not_disturbed():
    """They share scratch memory, and the inputs that siblings have rotated."""
    args = arguments(shape=(100,))
    x, first, second = args[0], *layers_of(*args[1:])[:2]
    before = torch.ops.quip.linear(x, *first)
    torch.ops.quip.bundle(x.flip(0), *args[1:])
    wanted = expected(*args)
    torch.testing.assert_close(before.double(), wanted[:, :16], rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(torch.ops.quip.linear(x, *second).double(), wanted[:, 16:64], rtol=1e-5, atol=1e-3)


def test_lists_of_different_lengths_are_refused():
    x, weight, su, sv, linears = arguments()
    with pytest.raises(ValueError, match="a bundle of 3 linears needs .* and 3 tensors of weights; it has 3, 3 and 2"):
        torch.ops.quip.bundle(x, weight[:2], su, sv, linears)
    with pytest.raises(ValueError, match="it has 2, 3 and 3"):
        torch.ops.quip.bundle(x, weight, su[:2], sv, linears)


def test_derivatives_forward_mode_and_vmap():
    args = arguments(dtype=torch.float64, shape=(2,))

    def function(x):
        return torch.ops.quip.bundle(x, *args[1:])

    x = args[0].requires_grad_()
    assert torch.autograd.gradcheck(function, (x,))
    tangent = torch.ones_like(x)
    _, derivative = torch.func.jvp(function, (x.detach(),), (tangent,))
    torch.testing.assert_close(derivative, function(tangent))
    x = x.detach()
    torch.testing.assert_close(torch.func.vmap(function)(torch.stack([x, -x])), torch.stack([function(x), -function(x)]))


def test_opcheck():
    args = arguments()
    torch.library.opcheck(torch.ops.quip.bundle.default, args)
    args[0].requires_grad_()
    torch.library.opcheck(torch.ops.quip.bundle.default, args)


def test_compiled_for_any_number_of_vectors():
    """One graph, for few vectors and for many, which take different ways."""
    args = arguments(shape=(3,))
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        return graph.forward

    function = torch.compile(
        lambda x: torch.ops.quip.bundle(x, *args[1:]).sin(), fullgraph=True, backend=compiler, dynamic=True
    )
    for vectors in (3, 5, 200):
        x = torch.randn(vectors, N, generator=torch.Generator().manual_seed(vectors))
        torch.testing.assert_close(function(x).double(), expected(x, *args[1:]).sin(), rtol=1e-3, atol=1e-3)
    assert len(graphs) == 1
    assert "quip.bundle" in graphs[0].code
