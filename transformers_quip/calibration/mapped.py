"""Tensors in a file that is mapped into memory: the system may write them out and read them again at any time."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch


def mapped(path: Path, shapes: Sequence[Sequence[int]], dtype: torch.dtype, new: bool) -> list[torch.Tensor]:
    """Tensors of these shapes, one after the other in a file.

    Args:
        path: of the file.
        shapes: of the tensors.
        dtype: of all of them.
        new: whether to make the file, with its space on the disk; other processes may make the same file at the same time.

    Raises:
        OSError: the disk is full, for example.
        ValueError: the file that is there has another size.
    """
    sizes = [math.prod(shape) for shape in shapes]
    length = sum(sizes) * dtype.itemsize
    if new:
        with path.open("ab") as file:
            file.truncate(length)
            _reserve(file.fileno(), length, path)
    elif path.stat().st_size != length:
        raise ValueError(f"{path} has {path.stat().st_size} bytes instead of {length}: start the run again with fresh=True")
    memory = torch.from_file(str(path), shared=True, size=sum(sizes), dtype=dtype)
    return [part.view(*shape) for part, shape in zip(memory.split(sizes), shapes, strict=True)]


def _reserve(descriptor: int, length: int, path: Path) -> None:
    """Take the space now: a write to a mapped file on a full disk would kill the process instead of raising an error."""
    if not hasattr(os, "posix_fallocate") or not length:
        return
    try:
        os.posix_fallocate(descriptor, 0, length)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # the file system cannot
            raise OSError(error.errno, os.strerror(error.errno or 0), str(path)) from None
