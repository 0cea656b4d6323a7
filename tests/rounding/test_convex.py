"""The convex program of bounded feedback: its constraints, and its optimum by another solver."""

import numpy as np
import pytest
import torch

from tests.problems import problem
from transformers_quip import codebooks, rounding
from transformers_quip.rounding import Problem
from transformers_quip.rounding.convex import bounded_feedback
from transformers_quip.rounding.ldlq import block_ldl


def hard_hessian(size, seed):
    """Inputs that predict each other well, so that unbounded feedback would be large."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * size, size, generator=generator, dtype=torch.float64)
    hessian = x.T @ x / len(x) + 5 * torch.ones(size, size)
    scale = torch.randn(size, generator=generator).double().exp()
    return hessian * scale * scale[:, None]


def value(r, hessian):
    return torch.trace(r @ hessian @ r.T).item()


def inverse(feedback):
    identity = torch.eye(len(feedback), dtype=feedback.dtype)
    return torch.linalg.solve_triangular(feedback, identity, upper=False, unitriangular=True)


@pytest.mark.parametrize("bound", [0.1, 1.0])
@pytest.mark.parametrize("size", [40, 120])
def test_constraints_hold_and_bind(size, bound):
    hessian = hard_hessian(size, 0)
    feedback = bounded_feedback(hessian, bound)
    assert torch.equal(feedback.triu(), torch.eye(size).double())
    r = inverse(feedback)
    norms = r.square().sum(0)
    assert norms.max() <= (1 + bound) * 1.0011
    free = inverse(block_ldl(hessian, 1))
    assert free.square().sum(0).max() > (1 + bound) * 1.5
    assert value(free, hessian) < value(r, hessian) < value(torch.eye(size).double(), hessian)


def projected_gradient(hessian, bound, steps=20000):
    """The optimum by another way: accelerated gradient steps on R, every column put back into its ball (FISTA)."""
    size = len(hessian)
    lower = np.tril(np.ones((size, size)), -1)
    rate = 1 / (2 * np.linalg.eigvalsh(hessian)[-1])
    entries = ahead = np.zeros((size, size))
    momentum = 1.0
    for _ in range(steps):
        trial = (ahead - rate * 2 * (np.eye(size) + ahead) @ hessian) * lower
        norms = np.sqrt(np.square(trial).sum(0))
        trial *= np.minimum(1, np.sqrt(bound) / np.maximum(norms, 1e-300))
        following = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
        ahead = trial + (momentum - 1) / following * (trial - entries)
        entries, momentum = trial, following
    return np.eye(size) + entries


@pytest.mark.parametrize(("bound", "seed"), [(0.05, 1), (0.3, 2), (1.0, 3)])
def test_optimum_equals_that_of_another_solver(bound, seed):
    hessian = hard_hessian(12, seed)
    wanted = torch.from_numpy(projected_gradient(hessian.numpy(), bound))
    assert wanted.square().sum(0).max() <= (1 + bound) * (1 + 1e-9)
    found = inverse(bounded_feedback(hessian, bound))
    assert value(found, hessian) == pytest.approx(value(wanted, hessian), rel=2e-3)


def test_without_a_bound_it_is_ldlq():
    _, hessian = problem(1, 60)
    torch.testing.assert_close(bounded_feedback(hessian.double(), 1e6), block_ldl(hessian.double(), 1))


def test_errors_pass_through_the_feedback_and_are_unbiased():
    book = codebooks.get("scalar8")  # wide enough that no weight meets the ends
    weight, hessian = problem(3000, 24)
    points = rounding.get("convex").round(Problem(20 * weight, hessian, book, seed=1)).points
    own = (20 * weight - points).double() @ bounded_feedback(hessian.double())
    assert own.abs().max() < 1 + 1e-4
    # Hoeffding: each lies within one unit of what was rounded; failure has probability below 1e-9.
    assert own.mean(0).abs().max() < np.sqrt(2 * np.log(2 * 24 / 1e-9) / len(own))


def test_a_hessian_without_a_cholesky_factor_is_refused():
    with pytest.raises(torch.linalg.LinAlgError):
        bounded_feedback(torch.eye(8) - 0.5)
