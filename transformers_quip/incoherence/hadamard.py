"""Hadamard matrices, built from number theory instead of tables.

A Hadamard matrix of order K has entries ±1 and satisfies H Hᵀ = K I. Four constructions cover every order that
checkpoints of the QuIP family use: Sylvester (powers of two), Paley I and II (from quadratic residues) and Williamson
(from four symmetric circulants). Sylvester's doubling then gives K·2^p from K.
"""

from __future__ import annotations

import functools

import torch

# First rows of the four symmetric circulant blocks A, B, C, D, for orders 4t that neither Paley construction reaches with
# a prime (Baumert and Hall, "Hadamard matrices of the Williamson type", Math. Comp. 19, 1965, and later searches). They
# are the matrices of the published checkpoints, so that one table serves them too.
_WILLIAMSON_ROWS = {
    52: ("+-+--++++--+-", "+---++++++---", "++-+--++--+-+", "+----+--+----"),
    92: (
        "+++-+++-+------+-+++-++",
        "+++---++-+-++-+-++---++",
        "+-++-++--++++++--++-++-",
        "++---+---+-++-+---+---+",
    ),
    100: (
        "+-++++----++--++----++++-",
        "+++-+++---+-++-+---+++-++",
        "+-++-+++-++----++-+++-++-",
        "+--++-+-+--------+-+-++--",
    ),
    116: (
        "++--+--+-+++-++++-+++-+--+--+",
        "++++-++-+---++++++---+-++-+++",
        "+-+---++--+-++++++-+--++---+-",
        "+++---++--+-+----+-+--++---++",
    ),
    124: (
        "+--+++-+--+----++----+--+-+++--",
        "+--+++-+--+----++----+--+-+++--",
        "+-----+++-+-+--++--+-+-+++-----",
        "++++++---+-+-++--++-+-+---+++++",
    ),
    156: (
        "+++--+-+-----+--++----++--+-----+-+--++",
        "++++---+--++----+-+--+-+----++--+---+++",
        "+++--++-+---+-+--+----+--+-+---+-++--++",
        "+---++-+-+-----+++-++-+++-----+-+-++---",
    ),
    172: (
        "+---++--++++-+-+++-++--++-+++-+-++++--++---",
        "++-++++++----+-+--++-++-++--+-+----++++++-+",
        "+++-+-++--+-+-++++-+----+-++++-+-+--++-+-++",
        "++---++++-+--+--++--------++--+--+-++++---+",
    ),
}


def sylvester(order: int) -> torch.Tensor:
    """The Hadamard matrix [order, order] of Sylvester, order a power of two, int8, natural order."""
    bits = torch.arange(order)
    common = bits[:, None] & bits[None, :]
    parity = torch.zeros_like(common)
    while common.any():
        parity ^= common & 1
        common >>= 1
    return (1 - 2 * parity).to(torch.int8)


def hadamard_matrix(order: int) -> torch.Tensor | None:
    """A Hadamard matrix of exactly this order, or None if no construction here reaches it.

    Args:
        order: 1, 2 or a multiple of 4 for a matrix to exist.

    Returns:
        int8 [order, order] with entries ±1, on the CPU. For an order that several constructions reach, the choice is the
        published checkpoints': Williamson's tables first, then Paley I, then Paley II, then Sylvester doubling.
    """
    if order < 1:
        raise ValueError(f"order={order} must be positive")
    if order & (order - 1) == 0:
        return sylvester(order)
    if order % 4:
        return None
    if order in _WILLIAMSON_ROWS:
        return _williamson(*_WILLIAMSON_ROWS[order])
    if _is_prime(order - 1) and (order - 1) % 4 == 3:
        return _paley_one(order - 1)
    if _is_prime(order // 2 - 1) and (order // 2 - 1) % 4 == 1:
        return _paley_two(order // 2 - 1)
    half = hadamard_matrix(order // 2)
    return None if half is None else torch.kron(sylvester(2), half)


def _quadratic_character(q: int) -> torch.Tensor:
    """χ(i − j) for i, j in the field of q elements: [q, q] int8, 1 for squares, −1 for the rest, 0 on the diagonal."""
    character = torch.full((q,), -1, dtype=torch.int8)
    character[torch.arange(1, q) ** 2 % q] = 1
    character[0] = 0
    index = torch.arange(q)
    return character[(index[:, None] - index[None, :]) % q]


def _paley_one(q: int) -> torch.Tensor:
    """Order q + 1 for a prime q ≡ 3 mod 4 (Paley, J. Math. Phys. 12, 1933)."""
    matrix = torch.ones(q + 1, q + 1, dtype=torch.int8)
    matrix[0, 1:] = -1
    matrix[1:, 1:] = _quadratic_character(q) + torch.eye(q, dtype=torch.int8)
    return matrix


def _paley_two(q: int) -> torch.Tensor:
    """Order 2(q + 1) for a prime q ≡ 1 mod 4 (Paley, J. Math. Phys. 12, 1933), from a symmetric conference matrix."""
    conference = torch.zeros(q + 1, q + 1, dtype=torch.int8)
    conference[0, 1:] = conference[1:, 0] = 1
    conference[1:, 1:] = _quadratic_character(q)
    eye = torch.eye(q + 1, dtype=torch.int8)
    return torch.cat(
        [torch.cat([conference + eye, conference - eye], 1), torch.cat([conference - eye, -conference - eye], 1)]
    )


def _williamson(*rows: str) -> torch.Tensor:
    """Order 4t from the first rows of four symmetric circulants of order t (Williamson, Duke Math. J. 11, 1944)."""
    a, b, c, d = (_circulant(row) for row in rows)
    return torch.cat(
        [
            torch.cat([a, b, c, d], 1),
            torch.cat([-b, a, -d, c], 1),
            torch.cat([-c, d, a, -b], 1),
            torch.cat([-d, -c, b, a], 1),
        ]
    )


def _circulant(row: str) -> torch.Tensor:
    values = torch.tensor([1 if sign == "+" else -1 for sign in row], dtype=torch.int8)
    return torch.stack([values.roll(shift) for shift in range(len(row))])


@functools.lru_cache(maxsize=4096)
def _is_prime(number: int) -> bool:
    if number < 2:
        return False
    divisor = 2
    while divisor * divisor <= number:
        if number % divisor == 0:
            return False
        divisor += 1
    return True
