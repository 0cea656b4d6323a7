"""LDLQ against its definition, written out in float64."""

import pytest
import torch

from tests.problems import problem
from transformers_quip import codebooks, rounding
from transformers_quip.rounding import Problem, proxy_loss
from transformers_quip.rounding.ldlq import block_ldl
from transformers_quip.rounding.sequential import PANEL

BOOK = codebooks.get("e8p")


def naive_ldlq(weight, hessian, sweeps):
    """Block by block with full matrices: no panels, float64."""
    weight, hessian = weight.double(), hessian.double()
    blocks = [slice(k, k + 8) for k in range(0, weight.shape[1], 8)]
    lower = torch.linalg.cholesky(hessian)
    for block in blocks:
        lower[:, block] = lower[:, block] @ torch.linalg.inv(lower[block, block])
    rounded = torch.zeros_like(weight)
    for block in reversed(blocks):
        later = slice(block.stop, None)
        target = weight[:, block] + (weight - rounded)[:, later] @ lower[later, block]
        rounded[:, block] = BOOK.encode(target.float())[1].double()
    for _ in range(sweeps):
        for block in reversed(blocks):
            step = (weight - rounded) @ hessian[:, block] @ torch.linalg.inv(hessian[block, block])
            rounded[:, block] = BOOK.encode((rounded[:, block] + step).float())[1].double()
    return rounded


@pytest.mark.parametrize("sweeps", [0, 1, 3])
@pytest.mark.parametrize("columns", [8, PANEL, PANEL + 40])
def test_equals_the_definition(columns, sweeps):
    weight, hessian = problem(48, columns)
    codes, points = rounding.get("ldlq").round(Problem(weight, hessian, BOOK, sweeps))
    wanted = naive_ldlq(weight, hessian, sweeps)
    # A tie within float32 rounding may fall either way and changes what follows in its row.
    assert (points.double() == wanted).all(1).float().mean() > 0.85
    assert torch.equal(BOOK.decode({"codes": codes}, columns), points)
    loss, wanted_loss = (proxy_loss(weight - p.float(), hessian).item() for p in (points, wanted))
    assert loss == pytest.approx(wanted_loss, rel=0.01)


def optq(weight, hessian, book):
    """OPTQ from its definition (arXiv 2210.17323, equation 2), float64: round a column, then move all that are left.

    The columns that are left are moved by −(w_q − quant(w_q)) [H_F⁻¹]_qq⁻¹ [H_F⁻¹]_q: with the Hessian H_F of those
    columns alone, inverted again for every q; q is a block of columns where the codebook has one. From the last column to
    the first, as LDLQ goes. Returns the points, and what every column had become when it was rounded.
    """
    left, hessian = weight.double().clone(), hessian.double()
    rounded, size = torch.zeros_like(left), book.block_size
    for begin in reversed(range(0, weight.shape[1], size)):
        end = begin + size
        q = slice(begin, end)
        inverse = torch.linalg.inv(hessian[:end, :end])
        rounded[:, q] = book.encode(left[:, q].float())[1].double()
        left[:, :begin] -= (left[:, q] - rounded[:, q]) @ torch.linalg.solve(inverse[q, q], inverse[q, :begin])
    return rounded, left


@pytest.mark.parametrize("name", ["scalar2", "scalar4", "d4", "e8p", "e8p-rvq3"])
def test_every_column_is_rounded_as_optq_has_moved_it(name):
    """QuIP's equivalence (arXiv 2307.13304): OPTQ's many moves add up to the one linear feedback of LDLQ."""
    book = codebooks.get(name)
    weight, hessian = problem(16, 96, seed=11)
    weight = weight * book.gaussian_scale
    rounded, moved = optq(weight, hessian, book)
    weight = weight.double()
    feedback = block_ldl(hessian.double(), book.block_size) - torch.eye(96)
    torch.testing.assert_close(moved, weight + (weight - rounded) @ feedback, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_of_single_columns_equals_optq(bits):
    book = codebooks.get(f"scalar{bits}")
    weight, hessian = problem(64, PANEL + 22, seed=bits)
    weight = weight * book.gaussian_scale
    points = rounding.get("ldlq").round(Problem(weight, hessian, book, 0)).points
    wanted, _ = optq(weight, hessian, book)
    # A tie within float32 rounding may fall either way and changes what follows in its row.
    assert (points.double() == wanted).all(1).float().mean() > 0.9
    loss, wanted_loss = (proxy_loss(weight - p.float(), hessian).item() for p in (points, wanted))
    assert loss == pytest.approx(wanted_loss, rel=0.01)


def test_block_ldl_is_a_factorisation():
    _, hessian = problem(1, 64)
    factor = block_ldl(hessian.double(), 8)
    middle = torch.linalg.solve(factor, torch.linalg.solve(factor, hessian.double()).T)
    inside = torch.block_diag(*[torch.ones(8, 8)] * 8).bool()
    torch.testing.assert_close(factor[inside].reshape(-1), torch.block_diag(*[torch.eye(8)] * 8)[inside].double())
    assert middle[~inside].abs().max() < 1e-9 * middle.abs().max()
    assert (factor.triu(8) == 0).all()


def test_feedback_and_sweeps_lower_the_proxy_loss():
    weight, hessian = problem(96, 256)
    losses = [
        proxy_loss(weight - rounding.get(name).round(Problem(weight, hessian, BOOK, sweeps)).points, hessian).item()
        for name, sweeps in (("nearest", 0), ("ldlq", 0), ("ldlq", 10))
    ]
    assert losses[1] < 0.9 * losses[0]
    assert losses[2] < losses[1]


def test_identity_hessian_makes_ldlq_nearest():
    weight, _ = problem(32, 64)
    nearest = rounding.get("nearest").round(Problem(weight, None, BOOK, 0))
    ldlq = rounding.get("ldlq").round(Problem(weight, torch.eye(64), BOOK, 2))
    assert torch.equal(nearest.codes, ldlq.codes)
    assert torch.equal(nearest.points, ldlq.points)


def test_proxy_loss_is_the_output_error():
    generator = torch.Generator().manual_seed(2)
    error = torch.randn(5, 12, generator=generator)
    x = torch.randn(700, 12, generator=generator)
    wanted = (x.double() @ error.double().T).square().sum() / 700
    assert proxy_loss(error, (x.T @ x) / 700).item() == pytest.approx(wanted.item(), rel=1e-5)


def test_a_hessian_without_a_cholesky_factor_is_refused():
    weight, hessian = problem(4, 16)
    hessian -= 2 * torch.linalg.eigvalsh(hessian).max() * torch.eye(16)
    with pytest.raises(torch.linalg.LinAlgError):
        rounding.get("ldlq").round(Problem(weight, hessian, BOOK, 0))
