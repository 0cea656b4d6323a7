"""Orthogonal transforms of any size, as Kronecker products of small factors."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch

from .hadamard import hadamard_matrix, sylvester
from .orthogonal import mix_seed, random_orthogonal
from .plain import made_plainly

# Dense factors above this order would cost more than the linear layer itself.
LARGEST_HADAMARD = 512
LARGEST_DENSE = 256
LARGEST_SYLVESTER = 128


class Transform:
    """An orthogonal matrix Q [size, size], kept as Kronecker factors Q = F₁ ⊗ F₂ ⊗ … and applied factor by factor.

    The index of a coordinate is (((i₁·f₂) + i₂)·f₃ + i₃)…: the last factor acts on neighbouring coordinates. Applying
    the transform to one vector costs size·(f₁ + f₂ + …) multiplications.

    Args:
        factors: each an orthogonal float64 tensor [f, f], or a [`Hartley`] factor.
    """

    def __init__(self, factors: Sequence[torch.Tensor | Hartley]):
        self._factors = tuple(factors)
        self._skipped = tuple(isinstance(f, torch.Tensor) and torch.equal(f, torch.eye(len(f)).to(f)) for f in factors)
        self.size = math.prod(factor.shape[0] for factor in self._factors)
        self._tables: dict[tuple[torch.device, torch.dtype], list] = {}

    @property
    def is_identity(self) -> bool:
        """Whether Q is the identity for certain."""
        return not self._factors

    @property
    def dense_factors(self) -> tuple[torch.Tensor, ...] | None:
        """The factors F₁, F₂, … as float64 matrices; None if one of them is not kept as a matrix."""
        dense = tuple(factor for factor in self._factors if not isinstance(factor, Hartley))
        return dense if len(dense) == len(self._factors) else None

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """Q x for every vector along the last dimension: [..., size] → [..., size], float32 or float64."""
        return self._multiply(x, transpose=False)

    def apply_transpose(self, x: torch.Tensor) -> torch.Tensor:
        """Qᵀ x, the inverse of [`apply`]: [..., size] → [..., size], float32 or float64."""
        return self._multiply(x, transpose=True)

    def matrix(self, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> torch.Tensor:
        """Q itself [size, size]; for tests and small sizes, nothing else needs it."""
        return self.apply(torch.eye(self.size, dtype=torch.float64)).T.to(device=device, dtype=dtype).contiguous()

    def _multiply(self, x: torch.Tensor, transpose: bool) -> torch.Tensor:
        if x.shape[-1:] != (self.size,):
            raise ValueError(f"expected vectors of {self.size} numbers in the last dimension, got {tuple(x.shape)}")
        if x.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"incoherence transforms compute in float32 or float64, got {x.dtype}")
        shape, after = x.shape, self.size
        for factor, skipped in zip(self._factors_on(x.device, x.dtype), self._skipped, strict=True):
            after //= factor.shape[0]
            if skipped:  # identity factor: marks the block structure
                continue
            x = x.reshape(-1, factor.shape[0], after)
            if isinstance(factor, Hartley):
                x = factor.multiply(x, transpose)
            elif after == 1:
                x = x.squeeze(-1) @ (factor if transpose else factor.T)
            else:
                x = (factor.T if transpose else factor) @ x
        return x.reshape(shape)

    def _factors_on(self, device: torch.device, dtype: torch.dtype) -> list:
        key = (device, dtype)
        if key not in self._tables:
            self._tables[key] = made_plainly(lambda: [factor.to(device=device, dtype=dtype) for factor in self._factors])
        return self._tables[key]


class Hartley:
    """The discrete Hartley transform of any order with random signs before it: orthogonal, and no table to keep.

    Entries are cos(2πjk/n) + sin(2πjk/n) over √n, at most √(2/n) in size, so that it spreads a vector almost as evenly
    as a Hadamard matrix; computed by an FFT (Bracewell, "Discrete Hartley transform", J. Opt. Soc. Am. 73, 1983).
    """

    def __init__(self, signs: torch.Tensor):
        self.signs = signs
        self.shape = (signs.numel(), signs.numel())

    def to(self, device: torch.device, dtype: torch.dtype) -> Hartley:
        return Hartley(self.signs.to(device=device, dtype=dtype))

    def multiply(self, x: torch.Tensor, transpose: bool) -> torch.Tensor:
        """Act on dimension 1 of x [batch, order, rest]."""
        signs = self.signs[:, None]
        spectrum = torch.fft.fft(x if transpose else signs * x, dim=1, norm="ortho")
        result = spectrum.real - spectrum.imag
        return signs * result if transpose else result


@functools.lru_cache(maxsize=256)
def hadamard(size: int, seed: int) -> Transform:
    """The Hadamard transform of any size (QuIP#, arXiv 2402.04396, section 3), never padded.

    With size = o·2^p, o odd: Sylvester's matrix if o = 1; else a Hadamard matrix of order o·2^j, the smallest that is
    constructible, times Sylvester's; else random orthogonal factors for o (QuIP, arXiv 2307.13304) times Sylvester's.

    Args:
        size: any positive number.
        seed: of the random orthogonal factors; without effect where a Hadamard matrix exists.
    """
    if size < 1:
        raise ValueError(f"size={size} must be positive")
    odd, power = size, 1
    while odd % 2 == 0:
        odd, power = odd // 2, power * 2
    factors: list[torch.Tensor | Hartley] = []
    if odd > 1:
        order = odd * 4
        while order <= min(LARGEST_HADAMARD, odd * power) and not factors:
            matrix = hadamard_matrix(order)
            if matrix is not None:
                factors.append(matrix.double() / math.sqrt(order))
                power //= order // odd
            order *= 2
        if not factors:
            factors = orthogonal_factors(odd, seed)
    factors += sylvester_factors(power)
    return Transform(factors or [torch.ones(1, 1, dtype=torch.float64)])


def sylvester_factors(power: int) -> list[torch.Tensor]:
    """Orthogonal Sylvester matrices, none larger than `LARGEST_SYLVESTER`, whose Kronecker product has this order."""
    bits = power.bit_length() - 1
    parts = math.ceil(bits / (LARGEST_SYLVESTER.bit_length() - 1))
    steps = [1 << (bits // parts + (part < bits % parts)) for part in range(parts)]
    return [sylvester(step).double() / math.sqrt(step) for step in steps]


def in_blocks(block: Transform, count: int) -> Transform:
    """The transform that applies one of these to each of `count` neighbouring blocks: I ⊗ Q.

    Raises:
        ValueError: the block's transform is not kept as matrices.
    """
    if block.dense_factors is None:
        raise ValueError(f"a transform of {block.size} numbers that is not a product of matrices cannot be used in blocks")
    return Transform([*(torch.eye(order, dtype=torch.float64) for order in _small_divisors(count)), *block.dense_factors])


def _small_divisors(count: int) -> list[int]:
    """Numbers of at most `LARGEST_DENSE` with this product where that can be, as few as possible; larger primes stay."""
    for first in range(min(count, LARGEST_DENSE), 1, -1):
        if count % first == 0:
            return [*_small_divisors(count // first), first]
    return [count] if count > 1 else []


@functools.lru_cache(maxsize=16)
def identity(size: int, seed: int) -> Transform:
    """No transform: Q = I. The baseline that shows the gain of incoherence."""
    return _Identity(size)


class _Identity(Transform):
    def __init__(self, size: int):
        super().__init__([])
        self.size = size


def orthogonal_factors(order: int, seed: int) -> list[torch.Tensor | Hartley]:
    """Random orthogonal factors: one dense matrix if small, else split as evenly as the order's divisors allow.

    A prime order above `LARGEST_DENSE` becomes a [`Hartley`] factor. All are float64 on the CPU.
    """
    if order <= LARGEST_DENSE:
        return [random_orthogonal(order, seed)]
    for divisor in range(math.isqrt(order), 1, -1):
        if order % divisor == 0:
            return orthogonal_factors(divisor, seed) + orthogonal_factors(order // divisor, seed)
    generator = torch.Generator().manual_seed(mix_seed(seed, order))
    return [Hartley(torch.randint(0, 2, (order,), generator=generator).double() * 2 - 1)]
