"""The ops through the compiled library: against float64 at sizes of every kind, and where the reference takes over."""

import logging
import threading

import pytest
import torch

from quip_kernels import cpu as cpu_kernels
from quip_kernels import cpu_many as many_kernels
from tests import truth
from transformers_quip import QuipLinear, incoherence, set_activations, set_backend
from transformers_quip.ops import Layer, reference
from transformers_quip.ops.cpu import run as cpu

needs_library = pytest.mark.skipif(not cpu_kernels.is_available(), reason="the CPU library was not compiled")

MANY = 72  # vectors: more than any setting multiplies by the codes
# Relative to the size of the output. Products with decoded weights are in the dtype of x if that is bfloat16.
ACCURACY = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}


@pytest.fixture(autouse=True)
def exact():
    set_activations("exact")
    yield
    set_backend("auto")
    set_activations("auto")


@pytest.fixture
def without_library(monkeypatch):
    monkeypatch.setattr(cpu_kernels, "is_available", lambda: False)
    cpu._tell.cache_clear()


def arguments(m, n, vectors, dtype=torch.float32, name="hadamard", bias=True):
    parts = truth.random_linear(m, n, dtype=dtype)
    x = torch.randn(vectors, n, generator=torch.Generator().manual_seed(9)).to(dtype)
    return [
        x,
        truth.weight(parts),
        parts["su"],
        parts["sv"],
        parts["bias"] if bias else None,
        "e8p",
        *incoherence.sides(name),
        3,
    ]


def relative_error(y, args):
    x, weight, su, sv, bias, _, name_in, name_out, seed = args
    q_in, q_out = (incoherence.get(name, len(v), seed).matrix() for name, v in ((name_in, su), (name_out, sv)))
    z = (x.double() * su.double()) @ q_in @ truth.decode(*weight, len(su)).T
    expected = z @ q_out.T * sv.double() + (0 if bias is None else bias.double())
    return ((y.double() - expected).norm() / expected.norm()).item()


@needs_library
@pytest.mark.parametrize("dtype", ACCURACY)
@pytest.mark.parametrize("vectors", [1, 2, 7, 12, MANY])
# 521 is a prime too large for a dense factor: its transform is an FFT, which the library has not.
@pytest.mark.parametrize(("m", "n"), [(576, 192), (192, 576), (96, 100), (33, 40), (521, 64), (64, 521), (7, 5)])
def test_layer(m, n, vectors, dtype):
    args = arguments(m, n, vectors, dtype)
    y = torch.ops.quip.linear(*args)
    assert y.dtype == dtype
    assert relative_error(y, args) < ACCURACY[dtype]
    args[4] = None
    assert relative_error(torch.ops.quip.linear(*args), args) < ACCURACY[dtype]


@needs_library
@pytest.mark.parametrize("name", ["none", ("hadamard", "none"), ("none", "hadamard")])
@pytest.mark.parametrize("vectors", [1, MANY])
def test_without_incoherence(vectors, name):
    args = arguments(48, 72, vectors, name=name)
    assert relative_error(torch.ops.quip.linear(*args), args) < ACCURACY[torch.float32]


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_vectors_are_decoded_block_by_block(monkeypatch, dtype):
    """Blocks of two tiles of rows give the same as the whole weight at once."""
    args = arguments(96, 64, MANY, dtype)
    whole = torch.ops.quip.linear(*args)
    monkeypatch.setattr(cpu, "DECODED_WEIGHTS", 40 * 64)
    y = torch.ops.quip.linear(*args)
    assert relative_error(y, args) < ACCURACY[dtype]
    torch.testing.assert_close(y, whole, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-2)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_activations(dtype):
    """Measured by others: 0.8 to 0.9 % of the output. Well above rounding, so that the setting is seen to act."""
    args = arguments(192, 576, 4, dtype, bias=False)
    set_activations("int8")
    assert 0.004 < relative_error(torch.ops.quip.linear(*args), args) < 0.015
    set_activations("exact")
    assert relative_error(torch.ops.quip.linear(*args), args) < ACCURACY[dtype]
    set_activations("auto")
    error = relative_error(torch.ops.quip.linear(*args), args)
    assert error < ACCURACY[dtype] if dtype == torch.float32 else 0.004 < error < 0.015


def test_unknown_activations():
    with pytest.raises(ValueError, match="activations='int4' is not known, choose one of 'auto', 'exact', 'int8'"):
        set_activations("int4")


@needs_library
@pytest.mark.parametrize("name", ["hadamard", "none"])
@pytest.mark.parametrize("size", [576, 521, 40])
def test_transform_and_decode_equal_the_reference(name, size):
    x = torch.randn(3, 2, size)
    for transpose in (False, True):
        y = torch.ops.quip.transform(x, name, 0, transpose)
        torch.testing.assert_close(y, reference.transform(x, name, 0, transpose), rtol=1e-5, atol=1e-5)
    codes = truth.random_linear(20, size)["codes"]
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        weight = torch.ops.quip.decode([codes], "e8p", 20, size, dtype)
        assert torch.equal(weight, reference.decode([codes], "e8p", 20, size, dtype))


def test_float64_is_computed_in_float64():
    args = arguments(96, 100, 3, torch.float64)
    assert relative_error(torch.ops.quip.linear(*args), args) < 1e-12


@pytest.mark.parametrize("backend", ["reference", "auto", "cpu"])
def test_the_backend_decides(backend):
    if backend == "cpu" and not cpu_kernels.is_available():
        pytest.skip("the CPU library was not compiled")
    set_backend(backend)
    args = arguments(96, 64, 1)
    assert relative_error(torch.ops.quip.linear(*args), args) < 2e-6
    usable = backend != "reference" and cpu_kernels.is_available()
    assert cpu.plan(args[0].dtype, Layer(*args[1:])).case.is_usable == usable


def test_without_the_library_the_reference_runs_and_says_so_once(without_library, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("transformers_quip"), "propagate", True)
    args = arguments(96, 64, 2)
    with caplog.at_level(logging.INFO, "transformers_quip"):
        y = torch.ops.quip.linear(*args)
        torch.ops.quip.linear(*args)
    assert relative_error(y, args) < 1e-6
    assert [record.getMessage() for record in caplog.records] == [
        "the compiled CPU library is missing (it is built if a C compiler is found at install time): quantized layers "
        "run through PyTorch, which is slower"
    ]


@needs_library
def test_compiled_with_changing_batch_sizes():
    args = arguments(48, 64, 1)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: torch.ops.quip.linear(x, *args[1:]) * 2, fullgraph=True, dynamic=True)
    for vectors in (2, 3, MANY):
        x = torch.randn(vectors, 64)
        assert torch.equal(compiled(x), torch.ops.quip.linear(x, *args[1:]) * 2)


@pytest.fixture
def nothing_rotated(monkeypatch):
    """As in a thread that has computed nothing yet."""
    monkeypatch.setattr(cpu, "_threads", threading.local())


def siblings(dtype, *rows):
    """Arguments of linears that read one input, the last of which has another su."""
    layers = [arguments(m, 96, MANY, dtype) for m in rows]
    for args in layers:
        args[0], args[2] = layers[0][0], layers[0][2].clone()
    layers[-1][2].neg_()
    return layers


@needs_library
@torch.no_grad()
@pytest.mark.usefixtures("nothing_rotated")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linears_of_one_input_share_its_transform(dtype):
    """The results are those of each alone; that the transform is reused is seen by who took it."""
    first, second, third = siblings(dtype, 64, 32, 48)
    takers = []
    for args in (first, second, third, first, first):
        assert relative_error(torch.ops.quip.linear(*args), args) < ACCURACY[dtype]
        takers.append(cpu.rotated_inputs().takers)
    # the second takes it; the third has another su, and no call is given what it computed itself
    assert takers == [1, 2, 1, 1, 1]
    x, su = first[0], first[2]
    for change in (lambda: x.mul_(2), su.neg_, lambda: x.view(torch.int16).numpy().fill(0)):
        torch.ops.quip.linear(*first)
        change()
        for args in (second, first):
            assert relative_error(torch.ops.quip.linear(*args), args) < ACCURACY[dtype]


@needs_library
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_code_that_writes_into_an_input_is_not_mistaken_for_the_same_input(dtype):
    """It reuses memory, tensor and all, and does not count that as a change."""
    first, second = arguments(64, 96, MANY, dtype), arguments(32, 96, MANY, dtype)
    second[0], second[2] = first[0], first[2]
    torch.ops.quip.linear(*first)
    first[0].data.neg_()  # as a compiled kernel: not counted either
    assert relative_error(torch.ops.quip.linear(*second), second) < ACCURACY[dtype]


needs_amx = pytest.mark.skipif(not many_kernels.is_available(), reason="needs the compiled CPU library and AMX")


@needs_amx
@torch.no_grad()
@pytest.mark.usefixtures("nothing_rotated")
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_many_bfloat16_vectors_share_rotated_inputs(context):
    dtype = torch.bfloat16
    with context():
        first, second, third = siblings(dtype, 64, 32, 96)
        takers = []
        for args in (first, second, third, first):
            assert relative_error(torch.ops.quip.linear(*args), args) < ACCURACY[dtype]
            takers.append(cpu.rotated_inputs().takers)
        assert takers == [1, 2, 1, 1]
        single = [first[0].float(), *first[1:]]  # nor does the other way of computing find those of this one
        assert relative_error(torch.ops.quip.linear(*single), single) < ACCURACY[torch.float32]
        assert relative_error(torch.ops.quip.linear(*second), second) < ACCURACY[dtype]


@needs_amx
@torch.no_grad()
def test_many_bfloat16_vectors_with_8_bit_activations():
    """Rotated inputs of one precision are not taken for those of another; codes of two stages keep bfloat16."""
    first, second, _ = siblings(torch.bfloat16, 64, 32, 32)
    for name, low, high in (("int8", 0.004, 0.015), ("exact", 0, 0.004), ("auto", 0.004, 0.015)):
        set_activations(name)
        for args in (first, second):
            assert low < relative_error(torch.ops.quip.linear(*args), args) < high
    parts = truth.random_linear(64, 96, dtype=torch.bfloat16, codebook="e8p-rvq4")
    weight = [parts["codes"], parts["codes_residual"]]
    args = [first[0], weight, parts["su"], parts["sv"], None, "e8p-rvq4", "none", "none", 0]
    dense = truth.decode(parts["codes"], 96, "e8p-rvq4", parts["codes_residual"])
    expected = (first[0].double() * parts["su"].double()) @ dense.T * parts["sv"].double()
    set_activations("int8")
    assert ((cpu.linear(*args).double() - expected).norm() / expected.norm()).item() < 0.004


@needs_amx
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vectors", [20, 21, 24, 25, MANY])
def test_prepared_layers_compute_what_the_op_does(dtype, vectors):
    """On both sides of the thresholds; few vectors, and those that are one call in bundles."""
    for activations in ("exact", "int8"):
        set_activations(activations)
        args = arguments(64, 96, vectors, dtype)
        module = QuipLinear(96, 64, dtype=dtype, seed=3)
        module.load_state_dict(dict(zip(("codes", "su", "sv", "bias"), (args[1][0], *args[2:5]), strict=True)))
        for _ in range(2):  # looked up, and prepared
            assert torch.equal(module(args[0]), torch.ops.quip.linear(*args))
        assert relative_error(module(args[0]), args) < 0.015


@needs_amx
@pytest.mark.parametrize("name", ["none", ("hadamard", "none"), ("none", "hadamard")])
def test_many_bfloat16_vectors_without_incoherence(name):
    args = arguments(64, 96, MANY, torch.bfloat16, name)
    assert relative_error(torch.ops.quip.linear(*args), args) < ACCURACY[torch.bfloat16]


@needs_library
@pytest.mark.parametrize(("m", "n"), [(96, 64), (64, 40)])
def test_many_bfloat16_vectors_on_other_processors(monkeypatch, m, n):
    monkeypatch.setattr(many_kernels, "is_available", lambda: False)
    args = arguments(m, n, MANY, torch.bfloat16)
    assert relative_error(torch.ops.quip.linear(*args), args) < ACCURACY[torch.bfloat16]
