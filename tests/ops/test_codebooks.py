"""The ops with every codebook: values against dense float64 formulas, derivatives, codes that do not fit."""

import pytest
import torch

from quip_kernels import cpu as cpu_kernels
from quip_kernels import cpu_linear as kernels
from tests import truth
from transformers_quip import set_backend

STAGED = ["e8p-rvq3", "e8p-rvq4"]
MANY = 72  # vectors: more than the library multiplies by the codes


@pytest.fixture(autouse=True)
def default_backend():
    yield
    set_backend("auto")


def arguments(codebook, m, n, vectors=3, dtype=torch.float32, residual_scale=None):
    parts = truth.random_linear(m, n, dtype=dtype, codebook=codebook)
    x = torch.randn(vectors, n, generator=torch.Generator().manual_seed(9)).to(dtype)
    spec = codebook if residual_scale is None else f"{codebook}@{residual_scale}"
    return [x, truth.weight(parts), parts["su"], parts["sv"], parts["bias"], spec, "hadamard", "hadamard", 0]


def expected(x, weight, su, sv, bias, codebook, name_in, name_out, seed):
    tensors = dict(zip(truth.STORED, weight, strict=False))
    return x.double() @ truth.dense_weight(**tensors, su=su, sv=sv, codebook=codebook).T + bias.double()


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("vectors", [1, 3, MANY])
@pytest.mark.parametrize("codebook", truth.CODEBOOKS)
def test_linear_is_the_formula(codebook, vectors, backend):
    set_backend(backend)
    for m, n in ((12, 64), (64, 20)):
        args = arguments(codebook, m, n, vectors)
        y = torch.ops.quip.linear(*args)
        wanted = expected(*args)
        assert ((y.double() - wanted).norm() / wanted.norm()).item() < 2e-6
        args = arguments(codebook, m, n, vectors, torch.bfloat16)
        y = torch.ops.quip.linear(*args)
        wanted = expected(*args)
        assert y.dtype == torch.bfloat16
        assert ((y.double() - wanted).norm() / wanted.norm()).item() < 6e-3


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("vectors", [1, MANY])
@pytest.mark.parametrize("codebook", STAGED)
@pytest.mark.parametrize("residual_scale", [0.25, -1.0])
def test_another_residual_scale(codebook, residual_scale, vectors, backend):
    set_backend(backend)
    args = arguments(codebook, 12, 64, vectors, residual_scale=residual_scale)
    wanted = expected(*args)
    assert ((torch.ops.quip.linear(*args).double() - wanted).norm() / wanted.norm()).item() < 2e-6
    weight = torch.ops.quip.decode(args[1], args[5], 12, 61, torch.float64)
    torch.testing.assert_close(weight, truth.decode(args[1][0], 61, args[5], args[1][1]), rtol=0, atol=1e-12)


@pytest.mark.skipif(not cpu_kernels.is_available(), reason="the CPU library was not compiled")
@pytest.mark.parametrize("codebook", STAGED)
def test_the_library_computes_two_stages(codebook, monkeypatch):
    called, function = [], kernels.linear
    monkeypatch.setattr(kernels, "linear", lambda *args, **options: called.append(args) or function(*args, **options))
    torch.ops.quip.linear(*arguments(codebook, 12, 64, 1))
    assert len(called) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("codebook", truth.CODEBOOKS)
def test_decode(codebook, dtype):
    parts = truth.random_linear(9, 29, codebook=codebook)
    weight = torch.ops.quip.decode(truth.weight(parts), codebook, 9, 29, dtype)
    wanted = truth.decode(**truth.stored(parts), columns=29, codebook=codebook)
    assert (weight.shape, weight.dtype) == ((9, 29), dtype)
    error = (weight.double() - wanted).abs()
    assert (error <= torch.finfo(dtype).eps / 2 * wanted.abs() + (0 if dtype == torch.float64 else 4e-7) + 1e-15).all()


@pytest.mark.parametrize("codebook", truth.CODEBOOKS)
def test_derivatives(codebook):
    args = arguments(codebook, 4, 8, 2, torch.float64, 0.5 if codebook in STAGED else None)
    for i in (0, 2, 3, 4):
        args[i].requires_grad_()
    assert torch.autograd.gradcheck(lambda *a: torch.ops.quip.linear(*a), args)


@pytest.mark.parametrize("codebook", ["e8p-rvq3", "scalar3"])
def test_opcheck(codebook):
    args = arguments(codebook, 12, 24, residual_scale=0.5 if codebook in STAGED else None)
    torch.library.opcheck(torch.ops.quip.linear.default, args)
    trained = [a.requires_grad_() if i in (0, 2, 3, 4) else a for i, a in enumerate(args)]
    torch.library.opcheck(torch.ops.quip.linear.default, trained)
    torch.library.opcheck(torch.ops.quip.decode.default, (args[1], args[5], 12, 24, torch.bfloat16))


def words(*shape):
    return torch.zeros(shape, dtype=torch.int16)


def octets(*shape):
    return torch.zeros(shape, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("codebook", "weight", "said"),
    [
        ("e8p-rvq3", [words(4, 3)], "'e8p-rvq3' stores codes, codes_residual, got 1 tensors"),
        ("e8p-rvq3", [words(4, 3)] * 2, r"codes_residual .* be torch.uint8 \[4, 3\], got torch.int16 \[4, 3\]"),
        ("e8p-rvq4", [words(4, 3), words(4, 2)], r"codes_residual .* be torch.int16 \[4, 3\], got torch.int16 \[4, 2\]"),
        ("e8p-rvq4", [octets(4, 3), words(4, 3)], r"codes .* be torch.int16 \[4, 3\], got torch.uint8 \[4, 3\]"),
        ("d4", [octets(4, 5)], r"codes .* be torch.uint8 \[4, 6\], got torch.uint8 \[4, 5\]"),
        ("scalar3", [octets(4, 8)], r"codes .* be torch.uint8 \[4, 9\], got torch.uint8 \[4, 8\]"),
        ("scalar2", [octets(4, 6)] * 2, "'scalar2' stores codes, got 2 tensors"),
    ],
)
def test_codes_that_do_not_fit(codebook, weight, said):
    with pytest.raises(ValueError, match=said):
        torch.ops.quip.decode(weight, codebook, 4, 24, torch.float32)
    vectors = torch.ones(24), torch.ones(4)
    with pytest.raises(ValueError, match="codes"):  # the compiled library has words of its own for it
        torch.ops.quip.linear(torch.ones(1, 24), weight, *vectors, None, codebook, "none", "none", 0)


def test_a_residual_scale_without_a_second_stage():
    with pytest.raises(ValueError, match="codebook 'd4' has no second stage"):
        torch.ops.quip.decode([octets(4, 6)], "d4@0.5", 4, 24, torch.float32)
