"""Mutations of pytorch_model.bin: code in it, other archives, other objects, damage."""

from __future__ import annotations

import io
import os
import pickle
import random
import zipfile
from pathlib import Path

import torch

from .mutations import mutation

BIN = "pytorch_model.bin"
MARKER = "EXECUTED"


class _Command:
    """Unpickled without care, it runs a command of the shell, which leaves a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.marker}",)


def _rewrite(content: bytes, compression: int, change=lambda name, data: data, extra: bytes | None = None) -> bytes:
    """The same archive with other entries."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(out, "w", compression) as target:
        root = source.infolist()[0].filename.partition("/")[0]
        for item in source.infolist():
            target.writestr(item.filename, change(item.filename, source.read(item)))
        if extra is not None:
            target.writestr(f"{root}/data/999", extra)
    return out.getvalue()


@mutation(6)
def bin_file(folder: Path, rng: random.Random) -> str | None:
    """What `torch.load` is given."""
    file = folder / BIN
    if not file.is_file():
        return None
    content = file.read_bytes()
    tensors = torch.load(file, map_location="cpu", weights_only=True)
    name = rng.choice(sorted(tensors))
    old = tensors[name]
    command = _Command(folder.parent / MARKER)
    # without computing: that would start a pool of threads, which does not survive a fork
    quantized = torch._empty_affine_quantized([4], scale=0.1, zero_point=0, dtype=torch.qint8)
    objects = {
        "code among the tensors": {**tensors, name: command},
        "a list": list(tensors.values()),
        "a sparse tensor": {**tensors, name: old.to_sparse() if old.dim() else 5},
        "no storage": {**tensors, name: torch.empty(old.shape, dtype=old.dtype, device="meta")},
        "strides of zero": {**tensors, name: torch.zeros((), dtype=old.dtype).expand(old.shape)},
        "a number as a name": {**tensors, 5: old},
        "a huge view": {**tensors, name: torch.zeros((), dtype=torch.int64).expand(1 << 20, 1 << 20)},
        "nested": {"state_dict": tensors},
        "a quantized tensor": {**tensors, name: quantized},
        "complex numbers": {**tensors, name: torch.zeros(old.shape, dtype=torch.complex64)},
        "another type": {**tensors, name: old.to(torch.float64 if old.is_floating_point() else torch.int64)},
        "another shape": {**tensors, name: old.flatten()},
        "lost": {key: value for key, value in tensors.items() if key != name},
        "not finite": {**tensors, name: torch.full(old.shape, float("nan")).half() if old.is_floating_point() else old},
        "transposed": {**tensors, name: old.T.contiguous().T if old.dim() == 2 else old},
    }
    other = ["pickle", "compressed", "a bomb", "short storages", "old format", "damaged pickle", "damaged old format"]
    how = rng.choice([*sorted(objects), *other])
    if how in objects:
        torch.save(objects[how], file)
    elif how == "pickle":
        file.write_bytes(pickle.dumps(command))
    elif how == "compressed":
        file.write_bytes(_rewrite(content, zipfile.ZIP_DEFLATED))
    elif how == "a bomb":
        file.write_bytes(_rewrite(content, zipfile.ZIP_DEFLATED, extra=bytes(1 << 28)))
    elif how == "short storages":
        file.write_bytes(
            _rewrite(content, zipfile.ZIP_STORED, lambda name, data: data[: len(data) // 2] if "/data/" in name else data)
        )
    elif how == "damaged pickle":
        damaged = bytearray(content)
        with zipfile.ZipFile(io.BytesIO(content)) as source:
            item = next(item for item in source.infolist() if item.filename.endswith("data.pkl"))
        for _ in range(rng.choice([1, 3, 20])):
            damaged[item.header_offset + 30 + rng.randrange(item.file_size + 100)] = rng.randrange(256)
        file.write_bytes(damaged)
    else:
        torch.save(tensors, file, _use_new_zipfile_serialization=False)
        if how == "damaged old format":
            damaged = bytearray(file.read_bytes())
            for _ in range(rng.choice([1, 3, 20])):
                damaged[rng.randrange(min(len(damaged), 20000))] = rng.randrange(256)
            file.write_bytes(damaged)
    return f"{BIN}: {how}, {name}"
