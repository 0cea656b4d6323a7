"""Hadamard matrices and transforms against their definitions."""

import math

import pytest
import scipy.linalg
import torch

from transformers_quip import incoherence
from transformers_quip.incoherence.hadamard import hadamard_matrix
from transformers_quip.incoherence.transform import Hartley

SIZES = [1, 2, 3, 7, 12, 36 * 16, 12 * 128, 4096, 107 * 256, 10920, 13696, 50257]


@pytest.mark.parametrize(
    "order",
    [1, 2, 4, 8, 12, 20, 24, 28, 36, 40, 44, 52, 60, 68, 76, 92, 100, 108, 116, 124, 140, 148, 156, 164, 172, 252],
)
def test_hadamard_matrices_are_orthogonal_with_entries_one(order):
    matrix = hadamard_matrix(order).long()
    assert (matrix.abs() == 1).all()
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.long))


def test_sylvester_equals_scipy():
    assert hadamard_matrix(64).tolist() == scipy.linalg.hadamard(64).tolist()


@pytest.mark.parametrize("order", [3, 6, 10, 14, 428])
def test_no_matrix_where_none_is_known_here(order):
    assert hadamard_matrix(order) is None


@pytest.mark.parametrize("size", SIZES)
def test_transform_is_orthogonal_at_every_size(size):
    transform = incoherence.get("hadamard", size, 0)
    assert transform.size == size
    x = torch.randn(3, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    y = transform.apply(x)
    torch.testing.assert_close(transform.apply_transpose(y), x, rtol=0, atol=1e-12)
    torch.testing.assert_close(y @ y.T, x @ x.T, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("size", [s for s in SIZES if s <= 1536] + [250, 2 * 257])
def test_both_directions_are_the_same_matrix(size):
    transform = incoherence.get("hadamard", size, 3)
    q = transform.matrix()
    torch.testing.assert_close(q @ q.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    x = torch.randn(4, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(transform.apply(x), x @ q.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(transform.apply_transpose(x), x @ q, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("size", "order"), [(16, 1), (128, 1), (576, 36), (1536, 12), (2752, 172), (20, 20)])
def test_hadamard_transform_is_the_kronecker_product_of_the_papers(size, order):
    sylvester = torch.tensor(scipy.linalg.hadamard(size // order)).double()
    wanted = torch.kron(hadamard_matrix(order).double(), sylvester) / math.sqrt(size)
    torch.testing.assert_close(incoherence.get("hadamard", size, 0).matrix(), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_one_coordinate_is_spread_over_all(size):
    """Incoherence: no entry of Q much above 1/√n; a random orthogonal matrix has √(2 log n)/√n per factor."""
    transform = incoherence.get("hadamard", size, 0)
    unit = torch.zeros(1, size, dtype=torch.float64)
    unit[0, size // 3] = 1
    largest = transform.apply(unit).abs().max().item() * math.sqrt(size)
    exact = all(not isinstance(f, Hartley) and (f.abs() - f.abs().max()).abs().max() < 1e-9 for f in transform._factors)
    assert largest < 1.0001 if exact else largest < 12


def test_hartley_factor_equals_its_formula():
    order = 1733
    signs = torch.randint(0, 2, (order,)).double() * 2 - 1
    k = torch.arange(order, dtype=torch.float64)
    angle = 2 * math.pi * k[:, None] * k / order
    matrix = (angle.cos() + angle.sin()) / math.sqrt(order) * signs
    x = torch.randn(2, order, 3, dtype=torch.float64)
    torch.testing.assert_close(Hartley(signs).multiply(x, False), matrix @ x, rtol=0, atol=1e-9)
    torch.testing.assert_close(Hartley(signs).multiply(x, True), matrix.T @ x, rtol=0, atol=1e-9)


def test_same_arguments_same_transform_and_other_seed_another():
    first = incoherence.get("hadamard", 107, 0).matrix()
    incoherence.transform.hadamard.cache_clear()
    assert torch.equal(first, incoherence.get("hadamard", 107, 0).matrix())
    assert not torch.allclose(first, incoherence.get("hadamard", 107, 1).matrix())


def test_float32_and_shapes():
    transform = incoherence.get("hadamard", 576)
    x = torch.randn(2, 3, 576)
    exact = transform.apply(x.double())
    torch.testing.assert_close(transform.apply(x), exact.float(), rtol=0, atol=2e-6)
    assert transform.apply(x[:0]).shape == (0, 3, 576)
    with pytest.raises(ValueError, match="vectors of 576"):
        transform.apply(torch.randn(575))
    with pytest.raises(TypeError, match="float32 or float64"):
        transform.apply(x.bfloat16())
    with pytest.raises(ValueError, match="must be positive"):
        incoherence.get("hadamard", 0)


def test_identity_and_unknown_names():
    x = torch.randn(4, 10)
    assert torch.equal(incoherence.get("none", 10).apply(x), x)
    with pytest.raises(ValueError, match="'hadamard'"):
        incoherence.get("hadamrd", 8)


def test_signs_are_seeded_and_differ_by_role():
    signs = incoherence.signs(4096, 0, "in")
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert abs(signs.mean().item()) < 0.08
    assert torch.equal(signs, incoherence.signs(4096, 0, "in"))
    for other in (incoherence.signs(4096, 1, "in"), incoherence.signs(4096, 0, "out")):
        assert abs((signs * other).mean().item()) < 0.08
    with pytest.raises(ValueError, match="role"):
        incoherence.signs(8, 0, "su")


def test_tables_have_values_whatever_the_default_device():
    incoherence.transform.hadamard.cache_clear()
    with torch.device("meta"):
        transform = incoherence.get("hadamard", 107 * 4, 11)
        signs = incoherence.signs(8, 0, "in")
    assert signs.device.type == "cpu"
    x = torch.randn(2, 428, dtype=torch.float64)
    torch.testing.assert_close(transform.apply_transpose(transform.apply(x)), x, rtol=0, atol=1e-12)
