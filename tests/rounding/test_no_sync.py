"""On a GPU, no rounding method makes the host wait for each column: tried on tensors without values."""

from __future__ import annotations

import pytest
import torch

from tests.no_sync import forbidden_synchronisation
from transformers_quip import codebooks, rounding
from transformers_quip.ops import backend
from transformers_quip.rounding import Problem
from transformers_quip.rounding.sequential import round_with_feedback, start, sweep

META = torch.device("meta")
BOOKS = ("e8p", "e8p-rvq3", "e8p-rvq4", "d4", "scalar3")


def problem(book, rows=24, columns=272):
    return Problem(torch.empty(rows, columns, device=META), torch.empty(columns, columns, device=META), book)


@pytest.mark.parametrize("name", BOOKS)
def test_feedback_and_sweeps_without_values(name):
    """The meta device refuses whatever depends on values; the mode refuses copies from the host, for which it waits too."""
    book = codebooks.get(name)
    given = problem(book)
    conditional = torch.empty(272 // book.block_size, book.block_size, book.block_size, device=META)

    def run():
        rounded = round_with_feedback(given.weight, given.hessian, book)
        sweep(given, conditional, start(given.weight, book))
        return rounded

    run()  # makes the tables
    with forbidden_synchronisation():
        rounded = run()
    assert rounded.points.shape == (24, 272)


@pytest.mark.parametrize("name", BOOKS)
@pytest.mark.parametrize("method", ["ldlq", "greedy", "quantease", "yaqa", "ldlq-rg"])
def test_waits_do_not_grow_with_the_columns(method, name, monkeypatch):
    """Counted in PyTorch on the CPU: as many for a weight of 16 x 32 as for one of 32 x 64."""
    book, counts = codebooks.get(name), []
    with backend.overridden(devices={"cpu": "reference"}):
        monkeypatch.setattr("quip_kernels.cpu.is_available", lambda: False)
        for rows, columns in ((16, 32), (32, 64)):
            generator = torch.Generator().manual_seed(columns)
            x = torch.randn(256, columns, generator=generator)
            out = torch.eye(rows) + 0.1 if method == "yaqa" else None
            weight = torch.randn(rows, columns, generator=generator)
            given = Problem(weight, x.T @ x / 256, book, sweeps=1, hessian_out=out)
            rounding.get(method).round(given)
            noted: list[str] = []
            with forbidden_synchronisation(noted):
                rounding.get(method).round(given)
            counts.append(noted)
    assert counts[0] == counts[1]
    assert len(counts[0]) <= 6
