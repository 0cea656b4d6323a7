"""Diagnostics of a layer besides its error: the distribution of its weights, and the condition of its Hessian."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

# Histograms are of w / rms(w), over ±HISTOGRAM_RANGE; values outside are counted in the outermost bins.
HISTOGRAM_BINS = 48
HISTOGRAM_RANGE = 6.0
_ITERATIONS = 24


def histogram(values: torch.Tensor) -> list[float]:
    """The share of the numbers in each bin of w / rms(w).

    Args:
        values: float, any shape, not empty.

    Returns:
        [`HISTOGRAM_BINS`] shares, from the lowest bin; their sum is 1. A weight of zeros is all in the middle.
    """
    rms = values.square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    scaled = (values / rms).clamp(-HISTOGRAM_RANGE, HISTOGRAM_RANGE)
    counts = torch.histc(scaled, HISTOGRAM_BINS, -HISTOGRAM_RANGE, HISTOGRAM_RANGE)
    return (counts / values.numel()).tolist()


def condition_number(matrix: torch.Tensor) -> float:
    """λ_max / λ_min of a symmetric matrix, by power iteration with it and with its inverse, in float64.

    A Cholesky factor and a few dozen products with a vector, which takes little time compared with rounding. Each
    iteration approaches its eigenvalue from inside, so the result is at most the condition number; it is mostly within a
    few per cent.

    Args:
        matrix: float [n, n].

    Returns:
        The number; `inf` if the matrix is not positive definite.
    """
    matrix = matrix.double()
    factor, info = torch.linalg.cholesky_ex(matrix)
    if info != 0:
        return math.inf
    start = torch.randn(len(matrix), 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(matrix)
    return _largest(lambda x: matrix @ x, start) * _largest(lambda x: torch.cholesky_solve(x, factor), start)


def _largest(apply: Callable[[torch.Tensor], torch.Tensor], vector: torch.Tensor) -> float:
    value = 0.0
    for _ in range(_ITERATIONS):
        vector = vector / vector.norm()
        image = apply(vector)
        value = (vector * image).sum().item()
        vector = image
    return value
