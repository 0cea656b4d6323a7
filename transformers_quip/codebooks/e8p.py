"""E8P, the padded E8 lattice codebook of QuIP# (arXiv 2402.04396, section 4.2): 65536 points for 8 weights.

A point is v ± 1/4, v a vector of half-integers with an even sum whose magnitudes are one of 256 patterns. The 16-bit
code holds the pattern (high byte), seven signs, and the side of the shift; the eighth sign follows from the even sum.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping

import torch

from quip_kernels import cpu as cpu_kernels

from .base import PANEL, Codebook, table
from .implementation import encoder

# Coordinates that are 1/2 (the other five are 3/2) in the last 29 patterns: the part of norm 12 that QuIP# kept.
_NORM_TWELVE = (
    "123 023 013 012 367 357 347 356 346 345 267 257 247 256 246 245 167 157 147 156 146 045 067 057 047 056 046 014 237"
)
# Bit of the low byte that holds the sign of coordinate 0..7.
_SIGN_BITS = (0, 4, 1, 5, 2, 6, 3, 7)
_SHIFT = 0.25
_FORBIDDEN = -1e4


@table
def magnitudes() -> torch.Tensor:
    """The 256 patterns |v|: float32 [256, 8].

    First all 227 vectors over {1/2, 3/2, 5/2} of squared norm at most 10 in lexicographic order, then 29 of norm 12.
    """
    small = [v for v in itertools.product((0.5, 1.5, 2.5), repeat=8) if sum(c * c for c in v) <= 10]
    large = [[0.5 if str(i) in halves else 1.5 for i in range(8)] for halves in _NORM_TWELVE.split()]
    return torch.tensor(small + large)


@table
def signed_base() -> torch.Tensor:
    """The patterns with coordinate 7 negated where the sum is odd, so that every row has an even sum: [256, 8]."""
    base = magnitudes().clone()
    base[:, 7] *= 1 - 2 * (base.sum(1) % 2)
    return base


@table
def points() -> torch.Tensor:
    """All points in the order of their codes: float32 [65536, 8], multiples of 1/4 in [−2.75, 2.75]."""
    low = torch.arange(256)
    parity = _popcount_parity(low)
    flips = low ^ parity
    signs = torch.stack([1 - 2 * ((flips >> bit) & 1) for bit in _SIGN_BITS], dim=1).float()
    shift = _SHIFT * (1 - 2 * parity).float()
    return (signed_base()[:, None, :] * signs + shift[:, None]).reshape(65536, 8)


class E8P(Codebook):
    """2 bits per weight. Mean squared error on a unit Gaussian about 0.09 (scalar 2-bit: 0.118; bound: 0.0625)."""

    name = "e8p"
    bits = 2.0
    block_size = 8
    code_dtype = torch.int16
    gaussian_scale = 1.03
    kernels = "e8p"

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See [`Codebook.encode`]; exact. Of two points at the same distance, the one shifted by +1/4."""
        rows = self.check_vectors(x)
        if encoder(rows.device) == "triton":
            from quip_kernels.gpu import nearest  # Triton is not installed everywhere

            codes, values = nearest.encode(rows.contiguous())
        elif rows.device.type == "cpu" and cpu_kernels.is_available():
            codes, values = cpu_kernels.e8p_encode(rows.contiguous())
        else:
            parts = [_encode(part) for part in rows.split(_rows_per_chunk(rows.device))]
            codes = torch.cat([part[0] for part in parts]) if parts else rows.new_empty(0, dtype=torch.int16)
            values = torch.cat([part[1] for part in parts]) if parts else rows
        return codes.reshape(x.shape[:-1]), values.reshape(x.shape)

    def round_panel(
        self, target: torch.Tensor, base: torch.Tensor, feedback: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See [`Codebook.round_panel`]; compiled where it can be."""
        if encoder(target.device) == "triton" and target.shape[1] <= PANEL:
            from quip_kernels.gpu import nearest

            return nearest.round_panel(target.contiguous(), base.contiguous(), feedback.contiguous())
        if target.device.type == "cpu" and cpu_kernels.is_available() and target.shape[1] <= cpu_kernels.MOST_COLUMNS:
            return cpu_kernels.e8p_round_panel(target.contiguous(), base.contiguous(), feedback.contiguous())
        return super().round_panel(target, base, feedback)

    def decode(self, tensors: Mapping[str, torch.Tensor], columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """See [`Codebook.decode`]. The values are exact in every floating dtype down to 8 bits."""
        codes = tensors["codes"]
        values = _points_on(codes.device, dtype)
        flat = values.index_select(0, codes.reshape(-1).int() & 0xFFFF)
        return flat.reshape(codes.shape[0], -1)[:, :columns]


def _encode(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest points of x [N, 8] without a compiled kernel: the same search, as two small matrix products.

    For one side of the shift, z = x ∓ 1/4 is reflected into the positive orthant. An even number of further sign
    changes is then never better than none, and where the parity asks for an odd number, changing the smallest
    coordinate is best, except in the 29 patterns whose permutations are not all there: for those every candidate is
    listed. So 227 + 29·4 products with |z| replace 65536 distances.
    """
    sides = [_encode_side(x, shift) for shift in (_SHIFT, -_SHIFT)]
    best = sides[1][2] < sides[0][2]
    codes = torch.where(best, sides[1][0], sides[0][0])
    values = torch.where(best[:, None], sides[1][1], sides[0][1])
    return codes.to(torch.int16), values


def _encode_side(x: torch.Tensor, shift: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    z = x - shift
    y = z.abs()
    odd = (z < 0).sum(1) % 2
    smallest = y.argmin(1, keepdim=True)
    flipped = y.scatter(1, smallest, -y.gather(1, smallest))
    # The vector to match with patterns of even sum, and with those of odd sum, given the parity of the removed signs.
    for_even = torch.where(odd.bool()[:, None], flipped, y)
    for_odd = torch.where(odd.bool()[:, None], y, flipped)
    features = torch.cat([for_even, for_odd, odd[:, None].float(), torch.ones_like(y[:, :1])], dim=1)
    scores, pattern, flip = _candidates(x.device)
    winner = (features @ scores).argmax(1)
    pattern, flip = pattern[winner], flip[winner]
    base = _base_on(x.device)[pattern]
    sums_odd = base.abs().sum(1).long() % 2
    # −1 in `flip` means: the smallest coordinate, if the parity asks for a change.
    needs = (odd != sums_odd) & (flip < 0)
    coordinate = torch.where(flip >= 0, flip, smallest[:, 0])
    negative = (z < 0) ^ ((coordinate[:, None] == torch.arange(8, device=x.device)) & ((flip >= 0) | needs)[:, None])
    value = torch.where(negative, -base.abs(), base.abs())
    weights = _sign_weights_on(x.device)
    low = ((negative != (base < 0)).long() * weights).sum(1) ^ int(shift < 0)
    codes = (pattern << 8) | low
    return codes, value + shift, ((z - value) ** 2).sum(1)


@table
def _candidates(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores ⟨z, v⟩ − |v|²/2 as one product: table [18, 343], and each candidate's pattern and changed coordinate."""
    columns, patterns, flips = [], [], []
    for index, pattern in enumerate(magnitudes()):
        odd = int(pattern.sum()) % 2
        column = torch.zeros(18)
        column[8 * odd : 8 * odd + 8] = pattern
        column[17] = -pattern.square().sum() / 2
        columns.append(column)
        patterns.append(index)
        flips.append(-1)
        if index >= 227:
            for coordinate in (pattern == 0.5).nonzero().flatten().tolist():
                # Their sum is odd: a change is allowed, and needed, only where the parity of the signs is even; then
                # the features for even sums are |z| untouched.
                changed = pattern.clone()
                changed[coordinate] *= -1
                column = torch.zeros(18)
                column[:8] = changed
                column[16] = _FORBIDDEN
                column[17] = -pattern.square().sum() / 2
                columns.append(column)
                patterns.append(index)
                flips.append(coordinate)
    return (
        torch.stack(columns, dim=1).to(device),
        torch.tensor(patterns, device=device),
        torch.tensor(flips, device=device),
    )


def _rows_per_chunk(device: torch.device) -> int:
    """The number of vectors whose scores (343 floats each) fit into a CPU's cache, or into 360 MB of a GPU's memory."""
    return 2048 if device.type == "cpu" else 1 << 18


@functools.lru_cache(maxsize=8)
def _sign_weights_on(device: torch.device) -> torch.Tensor:
    return torch.tensor([1 << bit for bit in _SIGN_BITS], device=device)


@functools.lru_cache(maxsize=8)
def _base_on(device: torch.device) -> torch.Tensor:
    return signed_base().to(device)


@functools.lru_cache(maxsize=16)
def _points_on(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return points().to(device=device, dtype=dtype)


def _popcount_parity(values: torch.Tensor) -> torch.Tensor:
    for shift in (4, 2, 1):
        values = values ^ (values >> shift)
    return values & 1
