"""The files of a checkpoint: what they say of their tensors, and single tensors out of them.

Safetensors, and for checkpoints of others what `torch.save` wrote, through PyTorch's safe unpickler only.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterable
from pathlib import Path
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open

from .family import DAMAGED
from .native import TensorInfo, read_headers

# Names of safetensors for the types of PyTorch.
TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Files:
    """The files of one checkpoint; open as long as this lives.

    Args:
        files: paths, all of one kind.

    Attributes:
        headers: shape and type of every tensor by its name.

    Raises:
        ValueError: a file cannot be read, or holds something other than tensors.
    """

    def __init__(self, files: Iterable[str]):
        files = [str(file) for file in files]
        self._loaded: dict[str, dict[str, torch.Tensor]] = {}
        self._open: dict[str, safe_open] = {}
        self.headers = read_headers([file for file in files if file.endswith(".safetensors")])
        for file in files:
            if not file.endswith(".safetensors"):
                self._loaded[file] = tensors = _load(file)
                self.headers.update(
                    (key, TensorInfo(tuple(value.shape), TYPES[value.dtype], file, key)) for key, value in tensors.items()
                )

    def read(self, info: TensorInfo) -> torch.Tensor:
        """One tensor; a view of the mapped file where that can be. Raises `ValueError` if it cannot be read."""
        if info.file in self._loaded:
            return self._loaded[info.file][info.key]
        try:
            if info.file not in self._open:
                self._open[info.file] = safe_open(info.file, framework="pt")
            return self._open[info.file].get_tensor(info.key)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{info.key} cannot be read from {info.file} ({error}): {DAMAGED}") from None


# What `torch.load` raises for a file that it cannot read, or will not.
UNREADABLE = (RuntimeError, OSError, EOFError, pickle.UnpicklingError)


def unreadable(file: str, error: Exception) -> ValueError:
    """The error to raise for one of `UNREADABLE`."""
    if isinstance(error, pickle.UnpicklingError):  # its message is long, and says how to run the code
        return ValueError(
            f"{file} cannot be read as a file of tensors alone: it holds something else, which may be code that would be "
            "run, or is damaged. Download it again, and if that does not help, get the checkpoint as safetensors"
        )
    return ValueError(f"{file} cannot be read as a file of tensors alone ({error}): {DAMAGED}")


def check_inside(folder: str | Path, files: Iterable[str]) -> None:
    """Raise `ValueError` for a path that leads out of a checkpoint's folder, as its index may name one."""
    root = os.path.abspath(folder)
    for file in files:
        if os.path.commonpath([root, os.path.abspath(file)]) != root:
            raise ValueError(f"The index of the checkpoint names {file}, which is not in {folder}: {DAMAGED}")


def _load(file: str) -> dict[str, torch.Tensor]:
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zipfile(file))
    except UNREADABLE as error:
        raise unreadable(file, error) from None
    if not isinstance(tensors, dict):
        raise ValueError(f"{file} holds {type(tensors).__name__} instead of tensors by names: {DAMAGED}")
    for key, value in tensors.items():
        if not isinstance(value, torch.Tensor) or value.dtype not in TYPES:
            raise ValueError(f"{file} holds {key!r}, which is no tensor of a known type: {DAMAGED}")
    return tensors
