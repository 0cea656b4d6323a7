"""torch.ops.quip.grouped_linear: values against dense float64 formulas, derivatives, PyTorch's opcheck."""

import pytest
import torch

import transformers_quip  # noqa: F401 - registers the ops
from tests import truth
from transformers_quip.ops import backend
from transformers_quip.ops.grouped import linear_by_token

EXPERTS, M, N = 5, 12, 24
# Tokens from ends[e − 1] to ends[e] belong to expert e: experts 1 and 4 have none, and the last two belong to none.
ENDS, TOKENS = [2, 2, 3, 7, 7], 9


def stacked(codebook="e8p", dtype=torch.float32, tokens=TOKENS, ends=ENDS):
    parts = [truth.random_linear(M, N, seed, dtype, codebook) for seed in range(EXPERTS)]
    names = [name for name in parts[0] if name.startswith("codes")]
    weight = [torch.stack([part[name] for part in parts]) for name in names]
    su, sv = (torch.stack([part[name] for part in parts]) for name in ("su", "sv"))
    x = torch.randn(tokens, N, generator=torch.Generator().manual_seed(9)).to(dtype)
    return [x, torch.tensor(ends), weight, su, sv, codebook, "hadamard", "hadamard", 0]


def dense(su, sv, codes):
    return [truth.dense_weight(*parts) for parts in zip(codes, su, sv, strict=True)]


def expected(x, ends, weights):
    y, begin = torch.zeros(len(x), M, dtype=torch.float64), 0
    for weight, end in zip(weights, ends.tolist(), strict=True):
        y[begin:end] = x[begin:end].double() @ weight.T
        begin = end
    return y


@pytest.fixture(params=["auto", "reference"])
def implementation(request):
    with backend.overridden(backend=request.param):
        yield request.param


def test_it_is_the_formula(implementation):
    x, ends, (codes,), su, sv, *names = stacked()
    y = torch.ops.quip.grouped_linear(x, ends, [codes], su, sv, *names)
    assert y.shape == (TOKENS, M)
    assert not y[7:].any()
    torch.testing.assert_close(y.double(), expected(x, ends, dense(su, sv, codes)), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype, implementation):
    x, ends, (codes,), su, sv, *names = stacked(dtype=dtype)
    y = torch.ops.quip.grouped_linear(x, ends, [codes], su, sv, *names)
    assert y.dtype == dtype
    wanted = expected(x, ends, dense(su, sv, codes))
    assert (y.double() - wanted).norm() < (1e-6 if dtype == torch.float64 else 0.02) * wanted.norm()


@pytest.mark.parametrize("codebook", ["e8p-rvq4", "d4", "scalar3"])
def test_other_codebooks_are_as_single_linears(codebook, implementation):
    x, ends, weight, su, sv, *names = stacked(codebook)
    y = torch.ops.quip.grouped_linear(x, ends, weight, su, sv, *names)
    begin = 0
    for expert, end in enumerate(ENDS):
        one = [w[expert] for w in weight]
        with backend.overridden(backend="reference"):
            single = torch.ops.quip.linear(x[begin:end], one, su[expert], sv[expert], None, *names)
        torch.testing.assert_close(y[begin:end], single, rtol=1e-4, atol=1e-4)
        begin = end


@pytest.mark.parametrize("ends", [[0] * 5, [9] * 5, [0, 0, 0, 0, 9]])
def test_all_tokens_for_one_expert_or_none(ends, implementation):
    x, ends, (codes,), su, sv, *names = stacked(ends=ends)
    y = torch.ops.quip.grouped_linear(x, ends, [codes], su, sv, *names)
    torch.testing.assert_close(y.double(), expected(x, ends, dense(su, sv, codes)), rtol=1e-5, atol=1e-4)
    assert torch.ops.quip.grouped_linear(x[:0], ends * 0, [codes], su, sv, *names).shape == (0, M)


def test_many_tokens_take_another_way(implementation):
    x, ends, (codes,), su, sv, *names = stacked(tokens=300, ends=[200, 200, 201, 290, 300])
    y = torch.ops.quip.grouped_linear(x, ends, [codes], su, sv, *names)
    torch.testing.assert_close(y.double(), expected(x, ends, dense(su, sv, codes)), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("codebook", ["e8p", "e8p-rvq4", "d4", "scalar3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_weight_for_each_token_gives_the_same(codebook, dtype):
    """The way of a GPU, which can be tried on a CPU."""
    x, ends, weight, su, sv, *names = stacked(codebook, dtype)
    with backend.overridden(backend="reference"):
        wanted = torch.ops.quip.grouped_linear(x, ends, weight, su, sv, *names)
    found = linear_by_token(x, ends, weight, su, sv, *names)
    assert found.dtype == dtype
    assert not found[7:].any()
    torch.testing.assert_close(found, wanted, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-4)


def test_derivatives(implementation):
    x, ends, (codes,), su, sv, *names = stacked(dtype=torch.float64)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: torch.ops.quip.grouped_linear(x, ends, [codes], su, sv, *names), (x,))
    su.requires_grad_()
    sv.requires_grad_()

    def of_all(x, su, sv):
        return torch.ops.quip.grouped_linear(x, ends, [codes], su, sv, *names)

    assert torch.autograd.gradcheck(of_all, (x, su, sv))


def test_forward_mode_and_vmap():
    x, ends, (codes,), su, sv, *names = stacked(dtype=torch.float64)

    def function(x):
        return torch.ops.quip.grouped_linear(x, ends, [codes], su, sv, *names)

    tangent = torch.ones_like(x)
    _, derivative = torch.func.jvp(function, (x,), (tangent,))
    torch.testing.assert_close(derivative, function(tangent))
    torch.testing.assert_close(torch.func.vmap(function)(torch.stack([x, -x])), torch.stack([function(x), -function(x)]))


def test_opcheck():
    arguments = stacked()
    torch.library.opcheck(torch.ops.quip.grouped_linear, arguments)
    arguments[0].requires_grad_()
    torch.library.opcheck(torch.ops.quip.grouped_linear, arguments)
    grad = torch.randn(TOKENS, M)
    torch.library.opcheck(torch.ops.quip.grouped_linear_backward, [grad, *stacked()[1:]])
