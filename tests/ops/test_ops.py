"""torch.ops.quip.*: values against dense float64 formulas, derivatives against finite differences, PyTorch's opcheck."""

import pytest
import torch

import transformers_quip  # noqa: F401 - registers the ops
from tests import truth
from transformers_quip import incoherence
from transformers_quip.incoherence import sides
from transformers_quip.ops import backend, reference

SIZES = [(16, 8), (12, 64), (64, 12), (7, 24), (1, 5), (96, 100)]
INCOHERENCE = ["hadamard", "none"]
SIDES = ["hadamard", "none", ("hadamard", "none"), ("none", "hadamard")]


def arguments(m, n, x_dtype=torch.float32, dtype=torch.float32, bias=True, incoherence="hadamard"):
    parts = truth.random_linear(m, n, dtype=dtype)
    x = torch.randn(2, 3, n, generator=torch.Generator().manual_seed(9)).to(x_dtype)
    return [
        x,
        truth.weight(parts),
        parts["su"],
        parts["sv"],
        parts["bias"] if bias else None,
        "e8p",
        *sides(incoherence),
        0,
    ]


def expected(x, weight, su, sv, bias, codebook, name_in, name_out, seed):
    """By the formula; the transforms as the matrices that their own tests check."""
    q_in, q_out = (incoherence.get(name, len(v), seed).matrix() for name, v in ((name_in, su), (name_out, sv)))
    weight = sv.double()[:, None] * (q_out @ truth.decode(*weight, len(su)) @ q_in.T) * su.double()
    y = x.double() @ weight.T
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("name", SIDES)
@pytest.mark.parametrize(("m", "n"), SIZES)
def test_linear_is_the_formula(m, n, name):
    args = arguments(m, n, incoherence=name)
    y = torch.ops.quip.linear(*args)
    assert y.shape == (2, 3, m)
    torch.testing.assert_close(y.double(), expected(*args), rtol=1e-5, atol=1e-4)


def test_linear_against_matrices_written_down_here():
    args = arguments(96, 64)
    weight = truth.dense_weight(*args[1], args[2], args[3])
    torch.testing.assert_close(
        torch.ops.quip.linear(*args).double(), args[0].double() @ weight.T + args[4].double(), rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("x_dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_computes_in_float32_or_more_and_returns_the_dtype_of_x(x_dtype, dtype):
    args = arguments(12, 64, x_dtype, dtype)
    args[2] = args[2] / 20  # keep float16 in its range
    with backend.overridden(activations="exact"):
        y = torch.ops.quip.linear(*args)
    assert y.dtype == x_dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(x_dtype, torch.finfo(x_dtype).eps)
    torch.testing.assert_close(y.double(), expected(*args), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(64,), (0, 64), (2, 0, 64), (2, 1, 3, 64)])
def test_linear_takes_any_leading_dimensions(shape):
    args = arguments(12, 64)
    args[0] = torch.randn(shape)
    y = torch.ops.quip.linear(*args)
    assert y.shape == (*shape[:-1], 12)
    torch.testing.assert_close(y.double(), expected(*args), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("name", INCOHERENCE)
def test_transform_is_the_matrix(name, transpose):
    x = torch.randn(3, 2, 96)
    q = truth.hadamard(96) if name == "hadamard" else torch.eye(96, dtype=torch.float64)
    y = torch.ops.quip.transform(x, name, 0, transpose)
    torch.testing.assert_close(y.double(), x.double() @ (q if transpose else q.T), rtol=1e-5, atol=1e-5)
    assert y.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [24, 17])
def test_decode_is_exact_in_every_dtype(dtype, columns):
    codes = truth.random_linear(50, 24)["codes"]
    weight = torch.ops.quip.decode([codes], "e8p", 50, columns, dtype)
    assert weight.dtype == dtype
    assert torch.equal(weight.double(), truth.decode(codes, columns))


@pytest.mark.parametrize(
    ("dtypes", "rows", "columns", "said"),
    [
        ([torch.int16], 4, 25, r"torch.int16 \[4, 4\], got torch.int16 \[4, 3\]"),
        ([torch.int16], 5, 24, r"torch.int16 \[5, 3\], got torch.int16 \[4, 3\]"),
        ([torch.int32], 4, 24, r"got torch.int32"),
        ([torch.int16, torch.int16], 4, 24, "'e8p' stores codes, got 2 tensors"),
    ],
)
def test_decode_refuses_codes_that_do_not_fit(dtypes, rows, columns, said):
    weight = [torch.zeros(4, 3, dtype=dtype) for dtype in dtypes]
    with pytest.raises(ValueError, match=said):
        reference.decode(weight, "e8p", rows, columns, torch.float32)
    with pytest.raises(ValueError, match=said):
        torch.ops.quip.decode(weight, "e8p", rows, columns, torch.float32)


@pytest.mark.parametrize("name", ["hadamard", ("none", "hadamard")])
@pytest.mark.parametrize("bias", [True, False])
def test_derivatives_of_linear(bias, name):
    args = arguments(12, 16, torch.float64, torch.float64, bias, name)
    for i in (0, 2, 3, 4):
        if args[i] is not None:
            args[i].requires_grad_()
    assert torch.autograd.gradcheck(lambda *a: torch.ops.quip.linear(*a), args)
    assert torch.autograd.gradgradcheck(lambda x: torch.ops.quip.linear(x, *args[1:]), args[0])


@pytest.mark.parametrize("needed", [0, 2, 3, 4])
def test_single_derivatives_of_linear_in_bfloat16(needed):
    """Each gradient alone, in the dtype of its input, against autograd through the dense formula."""
    args = arguments(12, 16, torch.bfloat16, torch.bfloat16)
    args[needed].requires_grad_()
    torch.ops.quip.linear(*args).float().square().sum().backward()
    dense = [a.detach().double().requires_grad_(i == needed) if i in (0, 2, 3, 4) else a for i, a in enumerate(args)]
    y = expected(*dense)
    y.backward(2 * torch.ops.quip.linear(*args).detach().double())  # the gradient that reached the op, rounded as it was
    assert args[needed].grad.dtype == torch.bfloat16
    torch.testing.assert_close(args[needed].grad.double(), dense[needed].grad, rtol=2e-2, atol=2e-1)
    assert all(args[i].grad is None for i in (0, 2, 3, 4) if i != needed)


def test_derivative_of_transform():
    x = torch.randn(2, 24, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: torch.ops.quip.transform(t, "hadamard", 0, True), x)


@pytest.mark.parametrize("name", INCOHERENCE)
def test_opcheck(name):
    for bias in (True, False):
        args = arguments(12, 24, bias=bias, incoherence=name)
        torch.library.opcheck(torch.ops.quip.linear.default, args)
        trained = [a.requires_grad_() if i in (0, 2, 3, 4) and a is not None else a for i, a in enumerate(args)]
        torch.library.opcheck(torch.ops.quip.linear.default, trained)
    for transpose in (True, False):
        torch.library.opcheck(torch.ops.quip.transform.default, (torch.randn(2, 24), name, 0, transpose))
    torch.library.opcheck(torch.ops.quip.decode.default, (args[1], "e8p", 12, 20, torch.bfloat16))


def test_compiled_forward_and_backward_equal_eager():
    args = arguments(12, 24)
    compiled = torch.compile(lambda *a: torch.ops.quip.linear(*a).sin(), fullgraph=True, backend="aot_eager", dynamic=True)
    gradients = []
    for function in (compiled, lambda *a: torch.ops.quip.linear(*a).sin()):
        leaves = {i: args[i].clone().requires_grad_() for i in (0, 2, 3, 4)}
        y = function(*[leaves.get(i, a) for i, a in enumerate(args)])
        y.sum().backward()
        gradients.append([y.detach(), *(leaf.grad for leaf in leaves.values())])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)
