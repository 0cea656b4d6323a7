"""The Hadamard matrices of QuIP-for-all that differ from the native ones.

That package keeps a table for every order 4·o up to 252, o odd. Most are the native matrices; for the orders here another
construction was used, so that the transform has a name of its own.
"""

from __future__ import annotations

import functools
import math

import torch

from .hadamard import _circulant, _paley_two, _quadratic_character, _williamson
from .transform import Transform, hadamard, sylvester_factors

# First rows of the circulant blocks A, B, C, D of the published tables.
_WILLIAMSON_244 = (
    "++--+--++--+-+-++++--+-----+------+-----+--++++-+-+--++--+--+",
    "++--+--++--+-+-++++--+-----+------+-----+--++++-+-+--++--+--+",
    "+---+-+-++++---++--+-++-+---++++++---+-++-+--++---++++-+-+---",
    "++++-+-+----+++--++-+--+-+++------+++-+--+-++--+++----+-+-+++",
)
_GOETHALS_SEIDEL = {
    188: (
        "+-+----+--+----++---++++---+-+----++++++--+---+",
        "-+-++++-++-++++--+++---+---+-+----++++++--+---+",
        "+---+--+-+-+++-++-+--++---+---+-----+++-+--+--+",
        "-+++-++-+-+---+--+-++-----+---+-----+++-+--+--+",
    ),
    236: (
        "+++++-++++-+--++--++++-+---+-++++-+---+-++---+--++++-++++--",
        "-++++-++++-+--++--++++-+---+-++-++++-++++--+---++-+---+-++-",
        "-----+----+-++--++----+-+++-+-+++-+---+-++---+--++++-++++--",
        "-++++-++++-+--++--++++-+---+-+-+----+----++-+++--+-+++-+--+",
    ),
}
_PALEY_TWO = (124,)
_SYMMETRIC = (212, 228, 252)
ORDERS = (*_PALEY_TWO, *_SYMMETRIC, *_GOETHALS_SEIDEL, 244)


def matrix(order: int) -> torch.Tensor:
    """The Hadamard matrix of one of `ORDERS`: int8 [order, order] of ±1."""
    if order in _PALEY_TWO:
        return _paley_two(order // 2 - 1)
    if order in _SYMMETRIC:
        return _symmetric(order - 1)
    if order == 244:
        return _williamson(*_WILLIAMSON_244)
    return _goethals_seidel(*_GOETHALS_SEIDEL[order])


@functools.lru_cache(maxsize=64)
def quip_for_all(size: int, seed: int) -> Transform:
    """QuIP-for-all's Hadamard transform: like [`hadamard`], with other matrices for some orders.

    Args:
        size: 4·o·2^p with o odd.
        seed: without effect.
    """
    odd = size
    while odd % 2 == 0:
        odd //= 2
    if 4 * odd not in ORDERS or size % 4:
        return hadamard(size, seed)
    return Transform([matrix(4 * odd).double() / math.sqrt(4 * odd), *sylvester_factors(size // (4 * odd))])


def _symmetric(q: int) -> torch.Tensor:
    """Order q + 1 for a prime q ≡ 3 mod 4: Paley's construction with χ(i + j) and −1 where that is 0."""
    character = _quadratic_character(q)[:, 0].clone()
    character[0] = -1
    index = torch.arange(q)
    result = torch.ones(q + 1, q + 1, dtype=torch.int8)
    result[1:, 1:] = character[(index[:, None] + index[None, :]) % q]
    return result


def _goethals_seidel(*rows: str) -> torch.Tensor:
    """Order 4t from the first rows of four circulants (Goethals and Seidel, J. Austral. Math. Soc. 11, 1970)."""
    a, b, c, d = (_circulant(row) for row in rows)
    flip = torch.eye(len(rows[0]), dtype=torch.int8).flip(1)
    br, cr, dr = (m @ flip for m in (b, c, d))
    btr, ctr, dtr = (m.T @ flip for m in (b, c, d))
    return torch.cat(
        [
            torch.cat([a, br, cr, dr], 1),
            torch.cat([-br, a, -dtr, ctr], 1),
            torch.cat([-cr, dtr, a, -btr], 1),
            torch.cat([-dr, -ctr, btr, a], 1),
        ]
    )
