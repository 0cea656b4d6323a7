"""LDLQ-RG against its definition: a permuted problem, rounded block by block in float64."""

import pytest
import torch

from tests.problems import problem
from transformers_quip import codebooks, rounding
from transformers_quip.rounding import Problem, proxy_loss


@pytest.mark.parametrize("book", ["scalar2", "e8p"])
def test_most_important_first_then_greedy_passes(book):
    book = codebooks.get(book)
    size = book.block_size
    weight, hessian = problem(40, 64, seed=2)
    weight, exact = weight * book.gaussian_scale, hessian.double()
    blocks = [slice(k, k + size) for k in range(0, 64, size)]
    order = sorted(blocks, key=lambda part: -exact[part, part].trace())
    wanted = weight.double().clone()
    done, left = [], weight.double().clone()
    for part in order:
        # What is best for the others is added to this block: the conditional mean of its error given theirs.
        if done:
            rest = [i for other in order if other not in done for i in range(other.start, other.stop)]
            past = [i for other in done for i in range(other.start, other.stop)]
            best = torch.linalg.solve(exact[rest][:, rest], exact[rest][:, past])
            place = [rest.index(i) for i in range(part.start, part.stop)]
            left[:, part] = weight[:, part] + (weight.double() - wanted)[:, past] @ best[place].T
        wanted[:, part] = book.encode(left[:, part].float())[1].double()
        done.append(part)
    points = rounding.get("ldlq-rg").round(Problem(weight, hessian, book, 0)).points
    assert (points.double() == wanted).all(1).float().mean() > 0.85  # ties, as in test_ldlq.py
    for _ in range(2):
        for part in order:
            step = (weight - wanted) @ exact[:, part] @ torch.linalg.inv(exact[part, part])
            wanted[:, part] = book.encode((wanted[:, part] + step).float())[1].double()
    points = rounding.get("ldlq-rg").round(Problem(weight, hessian, book, 2)).points
    loss, wanted_loss = (proxy_loss(weight - p.float(), hessian).item() for p in (points, wanted))
    assert loss == pytest.approx(wanted_loss, rel=0.01)
