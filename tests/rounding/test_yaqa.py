"""Two-sided rounding against the direct formula, tile by tile, and against LDLQ."""

from __future__ import annotations

import pytest
import torch

from transformers_quip import codebooks, rounding
from transformers_quip.rounding import Problem, proxy_loss, yaqa

E8P, SCALAR = codebooks.get("e8p"), codebooks.get("scalar2")


def hessian(size, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * size, size, generator=generator, dtype=torch.float64)
    x *= torch.logspace(0, 1.0, size, dtype=torch.float64)
    x = x @ torch.randn(size, size, generator=generator, dtype=torch.float64) / size**0.5
    matrix = x.T @ x / len(x)
    return (matrix / matrix.diagonal().mean() + 0.05 * torch.eye(size, dtype=torch.float64)).float()


def problem(rows, columns, codebook=E8P, sweeps=0, out=True, seed=0):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    output = hessian(rows, seed + 2) if out else None
    return Problem(weight, hessian(columns, seed + 1), codebook, sweeps, 0, output)


def unit_factor(matrix, size):
    """The block LDL factor without its unit diagonal, by the definition, in float64: L = C blockdiag(C)⁻¹ - I."""
    rows = len(matrix)
    cholesky = torch.linalg.cholesky(matrix.double())
    factor = torch.zeros_like(cholesky)
    for begin in range(0, rows, size):
        part = slice(begin, min(begin + size, rows))
        factor[:, part] = cholesky[:, part] @ torch.linalg.inv(cholesky[part, part])
        factor[part, part] = 0
    return factor


def direct(p, height):
    """Round tile by tile along anti-diagonals from the last corner, with the whole triple product for each target."""
    weight, width = p.weight.double(), p.codebook.block_size
    out, inner = unit_factor(p.hessian_out, height), unit_factor(p.hessian, width)
    points, error = torch.zeros_like(weight), torch.zeros_like(weight)
    high, wide = -(-len(weight) // height), weight.shape[1] // width
    for diagonal in range(high + wide - 2, -1, -1):
        for i in range(high):
            j = diagonal - i
            if not 0 <= j < wide:
                continue
            rows, columns = slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width)
            target = weight + out.T @ error @ inner + out.T @ error + error @ inner
            _, points[rows, columns] = p.codebook.encode(target[rows, columns].float().contiguous())
            error[rows, columns] = weight[rows, columns] - points[rows, columns]
    return points.float()


@pytest.mark.parametrize(("rows", "columns"), [(64, 96), (48, 32), (40, 64), (16, 64), (8, 32)])
@pytest.mark.parametrize("codebook", [E8P, SCALAR], ids=lambda book: book.name)
def test_it_is_the_direct_formula(rows, columns, codebook):
    p = problem(rows, columns, codebook)
    found = rounding.get("yaqa").round(p)
    expected = direct(p, yaqa.ROWS)
    # a tie in float32 may fall the other way, and changes what follows; the loss is the same
    same = (found.points == expected).float().mean()
    assert same > 0.999 or abs(loss(p, found.points) / loss(p, expected) - 1) < 1e-3
    assert torch.equal(codebook.decode(codebook.store(found.codes), columns), found.points)


def loss(p, points):
    return proxy_loss((p.weight - points).double(), p.hessian.double(), p.hessian_out.double()).item()


@pytest.mark.parametrize("sweeps", [0, 3])
@pytest.mark.parametrize("out", ["none", "identity"])
def test_without_an_output_hessian_it_is_ldlq(sweeps, out):
    p = problem(64, 96, sweeps=sweeps, out=False)
    expected = rounding.get("ldlq").round(p)
    if out == "identity":
        p = Problem(p.weight, p.hessian, p.codebook, sweeps, 0, torch.eye(64))
    found = rounding.get("yaqa").round(p)
    if out == "none" or sweeps == 0:
        assert torch.equal(found.codes, expected.codes)
        assert torch.equal(found.points, expected.points)
    else:  # a sweep that ends because nothing falls any more may end one earlier
        first, second = (proxy_loss(p.weight - one.points, p.hessian).item() for one in (found, expected))
        assert first == pytest.approx(second, rel=0.01)


@pytest.mark.parametrize("seed", range(3))
def test_it_loses_less_than_rounding_for_one_side(seed):
    p = problem(96, 128, seed=10 * seed)
    both = loss(p, rounding.get("yaqa").round(p).points)
    one = loss(p, rounding.get("ldlq").round(p).points)
    nearest = loss(p, rounding.get("nearest").round(p).points)
    assert both < 0.9 * one < 0.9 * nearest
    swept = loss(p, rounding.get("yaqa").round(Problem(p.weight, p.hessian, E8P, 3, 0, p.hessian_out)).points)
    assert swept < both


def test_another_output_hessian_changes_only_what_it_couples():
    p = problem(64, 64)
    blocks = torch.block_diag(hessian(32, 5), torch.eye(32))
    found = rounding.get("yaqa").round(Problem(p.weight, p.hessian, E8P, 0, 0, blocks))
    plain = rounding.get("ldlq").round(p)
    # rows 32 to 63 are independent of the others, and of each other
    assert torch.equal(found.codes[32:], plain.codes[32:])
    last = 32 - yaqa.ROWS  # the last group of the coupled ones has none below it
    assert torch.equal(found.codes[last:32], plain.codes[last:32])
    assert not torch.equal(found.codes[:last], plain.codes[:last])
