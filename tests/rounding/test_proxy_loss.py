"""The measure of all methods, against the Hessian of a loss written out in full."""

import pytest
import torch

from transformers_quip.rounding import proxy_loss


def moments(count, size, seed):
    x = torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.T @ x / count


def test_two_sided_it_is_the_quadratic_form_of_the_kronecker_product():
    error = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    inputs, outputs = moments(40, 9, 1), moments(40, 6, 2)
    vector = error.double().flatten()  # row by row: index i·9 + j
    wanted = vector @ torch.kron(outputs, inputs) @ vector
    assert proxy_loss(error, inputs.float(), outputs.float()).item() == pytest.approx(wanted.item(), rel=1e-5)


def test_the_identity_as_output_side_changes_nothing():
    error, inputs = torch.randn(6, 9, generator=torch.Generator().manual_seed(3)), moments(40, 9, 4).float()
    assert proxy_loss(error, inputs, torch.eye(6)).item() == pytest.approx(proxy_loss(error, inputs).item(), rel=1e-6)
