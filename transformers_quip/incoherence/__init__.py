"""Incoherence transforms: orthogonal matrices that spread outliers, so that no entry of a weight or Hessian dominates.

A transform is found by name and is a pure function of (name, size, seed), so that a checkpoint stores only the name and
the seed. A new transform is a function (size, seed) → [`Transform`] registered here, or from outside by [`register`].
"hadamard-N" is the Hadamard transform on each block of N numbers, "hadamard/N" that on N blocks (see `blocks.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch

from ..registry import Registry, suggest
from .blocks import EIGHTHS, block_count, block_size, block_transform, blocks_of, has_blocks, multiple_of
from .kronecker import kronecker
from .orthogonal import mix_seed
from .plain import made_plainly
from .quip_for_all import quip_for_all
from .transform import Transform, hadamard, identity

__all__ = [
    "STORED",
    "Transform",
    "block_count",
    "block_size",
    "blocks_of",
    "get",
    "is_known",
    "mix_seed",
    "multiple_of",
    "names",
    "names_in_files",
    "register",
    "sides",
    "signs",
    "unknown",
]

# Says that a side's transform is kept in the checkpoint (see `nn.general`): such checkpoints are read, none is made.
STORED = "stored"

_TRANSFORMS: Registry[Callable[[int, int], Transform]] = Registry("incoherence")


def register(name: str, build: Callable[[int, int], Transform]) -> None:
    """Add a transform, so that a config can name it: weights are quantized with it, saved, loaded and run.

    A checkpoint stores the name and the seed, not the matrix. So a model that was saved with it is loaded only where the
    same name was registered before, and `build` must give the same matrix on every machine.

    Args:
        name: as `QuipConfig(incoherence=name)` will have it.
        build: (size, seed) → the [`Transform`] of this size. It raises `ValueError` for a size that it does not have, which
            is then an error before any work. It is called once for each size and seed.

    Raises:
        ValueError: the name is taken, or it is a name like "hadamard-128".

    Example: one random orthogonal matrix, which mixes as well as any transform and is slow for large layers.

        def dense(size, seed):
            generator = torch.Generator().manual_seed(seed)
            gaussian = torch.randn(size, size, generator=generator, dtype=torch.float64)
            q, r = torch.linalg.qr(gaussian)
            return incoherence.Transform([q * r.diagonal().sign()])

        incoherence.register("dense", dense)
        QuipConfig(incoherence="dense")
    """
    if name == STORED:
        raise ValueError(f"incoherence {name!r} is the name of matrices that a checkpoint stores")
    if has_blocks(name):
        raise ValueError(f"incoherence {name!r} is the name of the Hadamard transform in blocks")

    @functools.lru_cache(maxsize=256)
    def checked(size: int, seed: int) -> Transform:
        transform = build(size, seed)
        if not isinstance(transform, Transform) or transform.size != size:
            given = f"one of {transform.size}" if isinstance(transform, Transform) else repr(transform)
            raise ValueError(f"incoherence {name!r} must give a Transform of {size} numbers, and gave {given}")
        return transform

    _TRANSFORMS.register(name, checked)


_TRANSFORMS.register("hadamard", hadamard)
_TRANSFORMS.register("kronecker", kronecker)
_TRANSFORMS.register("none", identity)
_TRANSFORMS.register(EIGHTHS, block_transform(EIGHTHS))
_TRANSFORMS.register("hadamard-quip-for-all", quip_for_all)


def names() -> tuple[str, ...]:
    """The transforms that a config can name, besides "hadamard-N" and "hadamard/N"."""
    return _TRANSFORMS.names()


def names_in_files() -> tuple[str, ...]:
    """The transforms that a saved model can name, besides those in blocks: [`names`], and matrices that it stores."""
    return (*_TRANSFORMS.names(), STORED)


def is_known(name: object) -> bool:
    """Whether a saved model can name this transform."""
    return isinstance(name, str) and (name in names_in_files() or has_blocks(name))


def unknown(name: object) -> str:
    """The names that there are, for an error about another one."""
    known = ", ".join(map(repr, names_in_files()))
    blocks = "'hadamard-N' for blocks of N numbers, such as 'hadamard-128', or 'hadamard/N' for N blocks"
    return f"{known}, {blocks}{suggest(name, names_in_files())}"


def sides(incoherence: str | Sequence[str]) -> tuple[str, str]:
    """The names of Q_in and Q_out: one name stands for both sides, a pair names (input side, output side)."""
    side_in, side_out = (incoherence, incoherence) if isinstance(incoherence, str) else incoherence
    return side_in, side_out


def get(name: str, size: int, seed: int = 0) -> Transform:
    """The transform of this name and size; cached. Raises `ValueError` for an unknown name."""
    return _kept(block_transform(name) if has_blocks(name) else _TRANSFORMS[name], size, seed)


@functools.lru_cache(maxsize=4096)
def _kept(build: Callable[[int, int], Transform], size: int, seed: int) -> Transform:
    return made_plainly(lambda: build(size, seed))


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
