"""Forward-mode derivatives of the ops and modules, in float64, against the dense formula."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap

from tests import truth
from transformers_quip import QuipLinear, incoherence
from transformers_quip.nn.fused import FusedRows, Fusion
from transformers_quip.nn.general import GeneralLinear

M, N = 12, 24


@pytest.fixture
def module():
    linear = QuipLinear(N, M)
    linear.load_state_dict(truth.random_linear(M, N))
    return linear.double().requires_grad_(False)


def dense(module):
    return truth.dense_weight(module.codes, module.su, module.sv)


def vectors(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dual_level(module, context, dtype):
    x, v = vectors(3, N).to(dtype), vectors(3, N, seed=2).to(dtype)
    module.to(dtype)
    with context():
        module(x)  # is prepared
        with forward_ad.dual_level():
            y, tangent = forward_ad.unpack_dual(module(forward_ad.make_dual(x, v)))
    weight = dense(module)
    for found, expected in ((y, x.double() @ weight.T + module.bias.double()), (tangent, v.double() @ weight.T)):
        assert found.dtype == dtype
        assert (found.double() - expected).norm() < {8: 1e-12, 4: 1e-5, 2: 1e-2}[dtype.itemsize] * expected.norm()


def test_jvp(module):
    x, v = vectors(3, N), vectors(3, N, seed=2)
    y, tangent = jvp(module, (x,), (v,))
    close(y, x @ dense(module).T + module.bias)
    close(tangent, v @ dense(module).T)


@pytest.mark.parametrize("name", ["su", "sv", "bias"])
def test_jvp_of_the_parameters(module, name):
    x, size = vectors(3, N), getattr(module, name).shape[0]
    v = vectors(size, seed=3)

    def of(p):
        return functional_call(module, {name: p}, (x,))

    p = getattr(module, name).detach()
    _, tangent = jvp(of, (p,), (v,))
    step = 1e-3  # the output is linear in each of these: finite differences are exact but for rounding
    close(tangent, (of(p + step * v) - of(p - step * v)) / (2 * step))


@pytest.mark.parametrize("jacobian", [jacfwd, jacrev])
def test_jacobian(module, jacobian):
    close(jacobian(module)(vectors(N)), dense(module))


def loss(module):
    return lambda x: module(x).sin().sum()


@pytest.mark.parametrize("outer", [jacfwd, jacrev])
@pytest.mark.parametrize("inner", [jacfwd, jacrev])
def test_hessian(module, outer, inner):
    x, weight = vectors(N), dense(module)
    y = x @ weight.T + module.bias
    close(outer(inner(loss(module)))(x), -weight.T @ (y.sin()[:, None] * weight))


def test_gradients_of_each_row(module):
    x, weight = vectors(5, N), dense(module)
    close(vmap(grad(loss(module)))(x), (x @ weight.T + module.bias).cos() @ weight)
    close(vmap(module)(x), x @ weight.T + module.bias)


def test_forward_over_backward(module):
    x, v = vectors(2, N).requires_grad_(), vectors(2, N, seed=2)
    with forward_ad.dual_level():
        y = module(forward_ad.make_dual(x, v))
        _, tangent = forward_ad.unpack_dual(y)
        tangent.square().sum().backward()
    assert x.grad is None or not x.grad.any()  # the tangent does not depend on x
    with forward_ad.dual_level():
        forward_ad.unpack_dual(module(forward_ad.make_dual(x, v)))[0].sum().backward()
    close(x.grad, dense(module).sum(0).expand(2, N))


def test_gradcheck_of_forward_mode(module):
    x = vectors(2, N).requires_grad_()
    assert torch.autograd.gradcheck(module, x, check_forward_ad=True)
    for transpose in (False, True):
        for name in ("hadamard", "none"):
            f = lambda t, name=name, transpose=transpose: torch.ops.quip.transform(t, name, 0, transpose)  # noqa: E731
            assert torch.autograd.gradcheck(f, x, check_forward_ad=True)


def test_other_modules():
    general = GeneralLinear(N - 4, M - 2, padded=(M, N), row_scales=True)
    for name, p in general.named_parameters():
        p.copy_(truth.random_linear(M, N)[name] if name == "codes" else torch.randn(p.shape))
    general = general.double().requires_grad_(False)
    x, v = vectors(3, N - 4), vectors(3, N - 4, seed=2)
    close(jvp(general, (x,), (v,))[1], v @ general.dequantize(torch.float64).T)
    parent = torch.nn.Module()
    parent.qkv = QuipLinear(N, M, bias=False)
    tensors = truth.random_linear(M, N)
    del tensors["bias"]
    parent.qkv.load_state_dict(tensors)
    parent.double().requires_grad_(False)
    rows = FusedRows(Fusion(parent, "qkv", 2), 2, 7)
    x, v = vectors(3, N), vectors(3, N, seed=2)
    close(jvp(rows, (x,), (v,))[1], v @ dense(parent.qkv)[2:7].T)


@pytest.mark.parametrize("size", [56, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tables_that_a_derivative_makes_first_serve_later_calls(size, dtype):
    """They are kept, so that they must not belong to the level of differentiation that needed them."""
    incoherence._kept.cache_clear()
    incoherence.hadamard.cache_clear()
    x = torch.randn(size, dtype=dtype, generator=torch.Generator().manual_seed(4))

    def f(z):
        return torch.ops.quip.transform(z, "hadamard", 3, False)

    found = [jacfwd(f)(x), jacrev(f)(x), torch.func.hessian(lambda z: f(z).square().sum())(x)]
    q = torch.stack([f(row) for row in torch.eye(size, dtype=dtype)]).T
    for value, expected in zip(found, [q, q, 2 * torch.eye(size, dtype=dtype)], strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


def test_tables_that_inference_mode_makes_first_can_be_differentiated():
    incoherence._kept.cache_clear()
    incoherence.hadamard.cache_clear()
    x = torch.randn(24, generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        expected = incoherence.get("hadamard", 24, 7).apply_transpose(x)
    x.requires_grad_()
    (incoherence.get("hadamard", 24, 7).apply(x) * x.detach()).sum().backward()
    torch.testing.assert_close(x.grad, expected.clone())  # d(v·Qx)/dx = Qᵀ v
