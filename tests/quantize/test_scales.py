"""su and sv after rounding against a least-squares solver in float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.problems import problem
from transformers_quip import QuipConfig
from transformers_quip.nn.replace import quantized_linear
from transformers_quip.quantize.layer import quantize_weights
from transformers_quip.quantize.scales import output_scales, refit


def case(seed=0):
    """(two weights [m_i, 24], their decoded values, a Hessian, su)"""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(rows, 24, generator=generator) for rows in (20, 12)]
    values = [weight + 0.3 * torch.randn(weight.shape, generator=generator) for weight in weights]
    _, hessian = problem(20, 24, seed=seed + 1)
    return weights, values, hessian, 1 + 0.1 * torch.randn(24, generator=generator)


def loss(weights, values, hessian, su, scales):
    total = 0.0
    for weight, value, sv in zip(weights, values, scales, strict=True):
        error = weight.double() - sv.double()[:, None] * value.double() * su.double()
        total += torch.trace(error @ hessian.double() @ error.T).item()
    return total


def least_squares(weights, values, hessian, scales):
    """The best su by a general solver: ‖(W_i - A_i diag(u)) C‖² with H = C Cᵀ, linear in u."""
    root = torch.linalg.cholesky(hessian.double())
    left, right = [], []
    for weight, value, sv in zip(weights, values, scales, strict=True):
        scaled = sv.double()[:, None] * value.double()
        # row i, column k of A diag(u) C is Σ_j a_ij u_j c_jk
        left.append(torch.einsum("ij,jk->ikj", scaled, root).reshape(-1, len(root)))
        right.append((weight.double() @ root).reshape(-1))
    return torch.linalg.lstsq(torch.cat(left), torch.cat(right)[:, None]).solution[:, 0]


def test_su_is_the_least_squares_solution_and_each_round_helps():
    weights, values, hessian, su = case()
    none, scales = refit(weights, values, hessian, su, 0)
    assert torch.equal(none, su)
    truth = least_squares(weights, values, hessian, scales)
    found, again = refit(weights, values, hessian, su, 1)
    torch.testing.assert_close(found.double(), truth, rtol=1e-4, atol=1e-4)
    losses = [loss(weights, values, hessian, su, scales), loss(weights, values, hessian, found, scales)]
    losses += [loss(weights, values, hessian, found, again)]
    losses += [loss(weights, values, hessian, *refit(weights, values, hessian, su, rounds)) for rounds in (2, 5)]
    assert all(second < first for first, second in itertools.pairwise(losses))


def test_sv_is_the_least_squares_solution():
    weights, values, hessian, _ = case(3)
    root = torch.linalg.cholesky(hessian.double())
    found = output_scales(weights[0], values[0], hessian)
    for row in range(len(found)):
        design = (values[0][row].double() @ root)[:, None]
        truth = torch.linalg.lstsq(design, (weights[0][row].double() @ root)[:, None]).solution
        assert found[row].item() == pytest.approx(truth.item(), rel=1e-4)


def test_values_of_zero_change_nothing():
    weights, values, hessian, su = case()
    found, scales = refit(weights, [torch.zeros_like(value) for value in values], hessian, su, 2)
    assert found.isfinite().all()
    assert all((sv == 0).all() for sv in scales)


def test_the_option():
    weight, hessian = problem(48, 64, seed=2)
    other = weight.flip(0)
    losses = {}
    for rounds in (0, 2):
        config = QuipConfig(refit=rounds, refinement_sweeps=1)
        found = quantize_weights({"a": weight, "b": other}, hessian, config)
        assert torch.equal(found["a"].su, found["b"].su)
        losses[rounds] = 0.0
        for name, dense in (("a", weight), ("b", other)):
            linear = quantized_linear(torch.nn.Linear(64, 48, bias=False), found[name], config)
            error = dense.double() - linear.dequantize(torch.float64)
            losses[rounds] += torch.trace(error @ hessian.double() @ error.T).item()
    assert losses[2] < losses[0]
