"""The files of a checkpoint: shapes and types of their tensors, and single tensors out of them.

Safetensors; and, for checkpoints of other packages, files of `torch.save`, through PyTorch's safe unpickler only.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open

from .headers import DAMAGED, TensorInfo, read_header, read_json, type_name


class Files:
    """The files of one checkpoint; open as long as this lives.

    Args:
        files: paths, all of one kind.

    Attributes:
        headers: shape and type of every tensor by its name.

    Raises:
        ValueError: a file cannot be read, or does not hold only tensors; or two files hold different tensors of one name.
    """

    def __init__(self, files: Iterable[str]):
        self._loaded: dict[str, dict[str, torch.Tensor]] = {}
        self._open: dict[str, safe_open] = {}
        self.headers: dict[str, TensorInfo] = {}
        for file in map(str, files):
            found = read_header(file) if file.endswith(".safetensors") else self._load(file)
            for key in found.keys() & self.headers.keys():
                self._check_equal(self.headers[key], found[key])
            self.headers.update(found)

    def close(self) -> None:
        """Let go of the files; nothing can be read from them afterwards."""
        self._open.clear()
        self._loaded.clear()

    def unmap(self) -> None:
        """Let go of the mapped files of which no tensor is left; they are mapped again when they are read again.

        A mapped file counts as memory where that is limited (RLIMIT_DATA), although its pages are the file's.
        """
        self._open.clear()

    def _load(self, file: str) -> dict[str, TensorInfo]:
        self._loaded[file] = tensors = _load(file)
        types = {key: str(type_name(value.dtype)) for key, value in tensors.items()}
        return {key: TensorInfo(tuple(value.shape), types[key], file, key) for key, value in tensors.items()}

    def _check_equal(self, first: TensorInfo, second: TensorInfo) -> None:
        """Refuse different tensors of one name in two files: nothing says which one is right."""
        if first != replace(second, file=first.file) or not self.read(first).equal(self.read(second)):
            raise ValueError(f"{second.key} is in {first.file} and in {second.file}, and is not the same there: {DAMAGED}")

    def read(self, info: TensorInfo) -> torch.Tensor:
        """One tensor; a view of the mapped file where possible. Raises `ValueError` if it cannot be read."""
        if info.file in self._loaded:
            return self._loaded[info.file][info.key]
        try:
            if info.file not in self._open:
                self._open[info.file] = safe_open(info.file, framework="pt")
            return self._open[info.file].get_tensor(info.key)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{info.key} cannot be read from {info.file} ({error}): {DAMAGED}") from None


def unreadable(file: str, error: Exception) -> ValueError:
    """The error to raise for a file that `torch.load` cannot read or refuses; it may raise any exception.

    Args:
        file: its path.
        error: the exception that was raised; never a `MemoryError`, which says nothing about the file.
    """
    if isinstance(error, pickle.UnpicklingError):  # its message is long, and says how to run the code
        return ValueError(
            f"{file} cannot be read as a file of tensors alone: it holds something else, which may be code that would be "
            "run, or is damaged. Download it again, and if that does not help, get the checkpoint as safetensors"
        )
    said = f"{type(error).__name__}: {error}"[:300]
    return ValueError(f"{file} cannot be read as a file of tensors alone ({said}): {DAMAGED}")


def find_weights(folder: str | Path) -> Path | None:
    """The one file of weights, or the index of several, that Transformers would choose; None if there is neither."""
    kinds = (("model", "safetensors"), ("pytorch_model", "bin"))
    names = (name for stem, kind in kinds for name in (f"{stem}.{kind}", f"{stem}.{kind}.index.json"))
    return next((path for path in map(Path(folder).joinpath, names) if path.is_file()), None)


def expand_weights(path: Path) -> list[str]:
    """The files of weights, from the path that [`find_weights`] found.

    Raises:
        ValueError: the index is not valid, or names files that are missing or outside the folder.
    """
    if path.suffix != ".json":
        return [str(path)]
    names = read_json(path).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(file, str) and file for file in names.values()):
        raise ValueError(f"{path} has no weight_map from tensors to files: {DAMAGED}")
    if not names:
        raise ValueError(f"{path} has an empty weight_map: {DAMAGED}")
    names = sorted(set(names.values()))
    check_inside(path.parent, [str(path.parent / file) for file in names])
    missing = [file for file in names if not (path.parent / file).is_file()]
    if missing:
        raise ValueError(f"{path.parent} has no {missing[0]}, which {path.name} lists: {DAMAGED}")
    return [str(path.parent / file) for file in names]


def check_inside(folder: str | Path, files: Iterable[str]) -> None:
    """Raise `ValueError` for a path that leads out of a checkpoint's folder, as its index may name one."""
    root = os.path.abspath(folder)
    for file in files:
        if os.path.commonpath([root, os.path.abspath(file)]) != root:
            raise ValueError(f"The index of the checkpoint names {file}, which is not in {folder}: {DAMAGED}")


def _load(file: str) -> dict[str, torch.Tensor]:
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zipfile(file))
    except MemoryError:
        raise
    except Exception as error:
        raise unreadable(file, error) from None
    if not isinstance(tensors, dict):
        raise ValueError(f"{file} holds {type(tensors).__name__} instead of tensors by names: {DAMAGED}")
    for key, value in tensors.items():
        if not (isinstance(key, str) and isinstance(value, torch.Tensor) and _is_plain(value)):
            raise ValueError(f"{file} holds {key!r}, which is not a tensor of a known type: {DAMAGED}")
    return tensors


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether it is an ordinary tensor in memory, of a known type: not sparse, and not on the meta device."""
    return type_name(tensor.dtype) is not None and tensor.layout == torch.strided and tensor.device.type == "cpu"
