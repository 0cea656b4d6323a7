"""Random orthogonal matrices, for the part of a size that no Hadamard matrix covers."""

from __future__ import annotations

import torch


def random_orthogonal(order: int, seed: int) -> torch.Tensor:
    """A random orthogonal matrix, Haar distributed, the same for the same arguments on every machine up to rounding.

    QR of a Gaussian matrix with the diagonal of R made positive (Mezzadri, "How to generate random matrices from the
    classical compact groups", Notices of the AMS 54, 2007).

    Args:
        order: the size.
        seed: of the generator; the order is mixed in, so that two sizes with one seed are not related.

    Returns:
        float64 [order, order] on the CPU.
    """
    generator = torch.Generator().manual_seed(mix_seed(seed, order))
    gaussian = torch.randn(order, order, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0)


def mix_seed(*parts: int) -> int:
    """One 63-bit seed from several integers (the 64-bit FNV-1a hash of their decimal digits)."""
    state = 0xCBF29CE484222325
    for byte in ",".join(map(str, parts)).encode():
        state = ((state ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return state >> 1
