"""LDLQ-RG: LDLQ in the order of the Hessian's diagonal, then greedy passes (QuIP, arXiv 2307.13304, supplement)."""

from __future__ import annotations

from dataclasses import replace

import torch

from .base import Problem, Rounded, Rounding
from .ldlq import LDLQ


class LDLQRG(Rounding):
    """LDLQ with the most important columns first: all others can still compensate their errors.

    A codebook of several weights keeps its blocks of neighbours together; a block's importance is the trace of its part
    of H.
    """

    name = "ldlq-rg"
    needs_hessian = True

    def round(self, problem: Problem) -> Rounded:
        """See [`Rounding.round`]; `sweeps` is the number of greedy passes."""
        hessian, size = problem.required_hessian, problem.codebook.block_size
        # LDLQ begins at the end.
        blocks = hessian.diagonal().reshape(-1, size).sum(1).argsort(stable=True)
        columns = (blocks[:, None] * size + torch.arange(size, device=blocks.device)).flatten()
        ordered = hessian[columns][:, columns]
        codes, points = LDLQ().round(replace(problem, weight=problem.weight[:, columns].contiguous(), hessian=ordered))
        return Rounded(codes[:, blocks.argsort()], points[:, columns.argsort()])
