"""The transform of QuIP: two random orthogonal factors and a random permutation."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch

from .orthogonal import mix_seed
from .transform import Hartley, Transform, orthogonal_factors


class PermutedTransform(Transform):
    """Q = Π (F₁ ⊗ F₂ ⊗ …), where Π moves coordinate `permutation[i]` to i.

    Large entries of an input are often neighbours, and one small factor alone could not spread them over the whole vector.

    Args:
        factors: see [`Transform`].
        permutation: int64 [size].
    """

    def __init__(self, factors: Sequence[torch.Tensor | Hartley], permutation: torch.Tensor):
        super().__init__(factors)
        self._permutation = permutation
        self._inverse = permutation.argsort()

    @property
    def dense_factors(self) -> None:
        """None: Q is not the product of its factors alone."""
        return None

    def _multiply(self, x: torch.Tensor, transpose: bool) -> torch.Tensor:
        if transpose and x.shape[-1:] == (self.size,):
            return super()._multiply(x[..., self._inverse.to(x.device)], True)
        return super()._multiply(x, transpose)[..., self._permutation.to(x.device)]


@functools.lru_cache(maxsize=256)
def kronecker(size: int, seed: int) -> Transform:
    """Kronecker product of two random orthogonal matrices, permuted (QuIP, arXiv 2307.13304, section 4.1, algorithm 2).

    size = p·q with p ≤ q as close as its divisors allow, so that a product costs size·(p + q). Of a prime p or q too
    large to keep as a matrix, see [`orthogonal_factors`].

    Args:
        size: any positive number.
        seed: of both factors and the permutation; nothing else is kept.
    """
    if size < 1:
        raise ValueError(f"size={size} must be positive")
    small = next(p for p in range(math.isqrt(size), 0, -1) if size % p == 0)
    factors = []
    for role, order in enumerate((small, size // small)):
        if order > 1 or size == 1:
            factors += orthogonal_factors(order, mix_seed(seed, role))
    generator = torch.Generator().manual_seed(mix_seed(seed, size))
    return PermutedTransform(factors, torch.randperm(size, generator=generator))
