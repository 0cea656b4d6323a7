"""Incoherence transforms: orthogonal matrices after which no entry of a weight or Hessian sticks out.

A transform is found by name and is a pure function of (name, size, seed), so that a checkpoint stores only the name and
the seed. A new transform is a function (size, seed) → [`Transform`] registered here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..registry import Registry
from .kronecker import kronecker
from .orthogonal import mix_seed
from .quip_for_all import quip_for_all
from .transform import Transform, hadamard, hadamard_128, hadamard_eighths, identity

# Says that a side's transform is kept in the checkpoint (see `nn.general`): such checkpoints are read, none is made.
STORED = "stored"
# Those that exist for multiples of a number only.
IN_BLOCKS = {"hadamard-128": 128, "hadamard-eighths": 8}

_TRANSFORMS: Registry[Callable[..., Transform]] = Registry("incoherence")
_TRANSFORMS.register("hadamard", hadamard)
_TRANSFORMS.register("kronecker", kronecker)
_TRANSFORMS.register("none", identity)
_TRANSFORMS.register("hadamard-128", hadamard_128)
_TRANSFORMS.register("hadamard-eighths", hadamard_eighths)
_TRANSFORMS.register("hadamard-quip-for-all", quip_for_all)


def names() -> tuple[str, ...]:
    """The transforms that a config can name."""
    return _TRANSFORMS.names()


def names_in_files() -> tuple[str, ...]:
    """The transforms that a saved model can name: those of [`names`] and the stored one."""
    return (*_TRANSFORMS.names(), STORED)


def sides(incoherence: str | Sequence[str]) -> tuple[str, str]:
    """The names of Q_in and Q_out: one name stands for both sides, a pair names (input side, output side)."""
    side_in, side_out = (incoherence, incoherence) if isinstance(incoherence, str) else incoherence
    return side_in, side_out


def get(name: str, size: int, seed: int = 0) -> Transform:
    """The transform of this name and size; cached. Raises `ValueError` for an unknown name."""
    # Transformers builds models under torch.device("meta"), where a table made first would be cached without values.
    with torch.device("cpu"):
        return _TRANSFORMS[name](size, seed)


def signs(size: int, seed: int, role: str) -> torch.Tensor:
    """Random signs, the start of su (role "in") and sv (role "out").

    They depend on nothing but the arguments: linears that read the same input get the same su, and can share its
    transform.

    Returns:
        float32 [size] of ±1 on the CPU.
    """
    if role not in ("in", "out"):
        raise ValueError(f"role={role!r} must be 'in' or 'out'")
    generator = torch.Generator().manual_seed(mix_seed(seed, size, role == "out"))
    return torch.randint(0, 2, (size,), generator=generator, device="cpu").float() * 2 - 1
