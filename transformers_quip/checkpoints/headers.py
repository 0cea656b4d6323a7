"""The headers of safetensors files: the shape, the type and the size of every tensor; no tensor is read.

This file is the only one that reads headers and the only one that knows the names of types. Only
[`torch_dtype`] imports PyTorch, so a model of any size is described without it.

Source: the description of the format, https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

DAMAGED = "the files are damaged, incomplete, or do not belong to this config.json: download or save the model again"

# The name of a type in safetensors → its bits, and its name in PyTorch where tensors of it are read or written here.
_TYPES: dict[str, tuple[int, str | None]] = {
    "F64": (64, "float64"),
    "F32": (32, "float32"),
    "F16": (16, "float16"),
    "BF16": (16, "bfloat16"),
    "I64": (64, "int64"),
    "I32": (32, "int32"),
    "I16": (16, "int16"),
    "I8": (8, "int8"),
    "U8": (8, "uint8"),
    "BOOL": (8, "bool"),
    "C64": (64, None),
    "U64": (64, None),
    "U32": (32, None),
    "U16": (16, None),
    "F8_E4M3": (8, None),
    "F8_E5M2": (8, None),
    "F8_E8M0": (8, None),
    "F8_E4M3FNUZ": (8, None),
    "F8_E5M2FNUZ": (8, None),
    "F6_E2M3": (6, None),
    "F6_E3M2": (6, None),
    "F4": (4, None),
}
_NAMES = {torch_name: name for name, (_, torch_name) in _TYPES.items() if torch_name}
# The format's own limit on the length of a header, in bytes.
_MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class TensorInfo:
    """The entry of one tensor in the header of its file.

    Attributes:
        shape: its sizes.
        dtype: the name of its type in safetensors, such as "BF16".
        file: the path of the file that holds it.
        key: its name in that file.
        as_it_is: whether the model has it in this shape. Transformers splits some tensors, and joins others.
    """

    shape: tuple[int, ...]
    dtype: str
    file: str = ""
    key: str = field(default="", compare=False)
    as_it_is: bool = True

    @property
    def elements(self) -> int:
        """Its number of entries."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Its size in the file. Raises `ValueError` if the type is not one of safetensors' types."""
        if self.dtype not in _TYPES:
            raise ValueError(f"{self.key} has the type {self.dtype}, which is not a known type of safetensors")
        return -(-self.elements * _TYPES[self.dtype][0] // 8)


def check_is_there(source: str | os.PathLike) -> None:
    """Refuse a path that leads nowhere; a name that the Hub may have ("name", "owner/name") passes.

    Raises:
        FileNotFoundError: it can only be a path, and there is no such folder.
    """
    text = os.fspath(source)
    local = text.startswith(("/", "./", "../", "~", os.sep)) or text.count("/") > 1 or Path(text).is_absolute()
    if local and not os.path.exists(text):
        raise FileNotFoundError(f"there is no folder {text}")


def is_supported(dtype: str) -> bool:
    """Whether tensors of this type (by its name in safetensors) are read and written."""
    return torch_dtype_name(dtype) is not None


def supported_types() -> tuple[str, ...]:
    """The names in safetensors of the types for which [`is_supported`] holds."""
    return tuple(_NAMES.values())


def torch_dtype_name(dtype: str) -> str | None:
    """PyTorch's name of a type of safetensors: "BF16" → "bfloat16"; None if the type is not supported."""
    return _TYPES.get(dtype, (0, None))[1]


def torch_dtype(dtype: str) -> torch.dtype:
    """PyTorch's type for a type of safetensors. Raises `ValueError` if the type is not supported."""
    import torch

    name = torch_dtype_name(dtype)
    if name is None:
        raise ValueError(f"the type {dtype} is not supported; types are {', '.join(supported_types())}")
    return getattr(torch, name)


def type_name(dtype: torch.dtype | str) -> str | None:
    """The name in safetensors of a type of PyTorch (or of its name, "bfloat16"); None if it is not supported."""
    return _NAMES.get(str(dtype).removeprefix("torch."))


def type_bytes(dtype: torch.dtype | str) -> int | None:
    """Bytes of one number of a type of PyTorch (or of its name, "bfloat16"); None if it is not supported."""
    name = type_name(dtype)
    return None if name is None else _TYPES[name][0] // 8


def read_headers(files: Iterable[str | Path]) -> dict[str, TensorInfo]:
    """Every tensor in these safetensors files by its name; no tensor is read.

    Raises:
        ValueError: a file is not a safetensors file, or is damaged, or ends before its tensors do.
    """
    headers: dict[str, TensorInfo] = {}
    for file in files:
        headers.update(read_header(file))
    return headers


def read_header(file: str | Path) -> dict[str, TensorInfo]:
    """Every tensor in one file: see [`read_headers`]. The file is eight bytes with a length, a JSON object, and numbers."""
    path = Path(file)
    if path.suffix != ".safetensors":
        raise ValueError(f"{file} is not a safetensors file, and transformers-quip reads no other format")
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(_MAX_HEADER, size - 8):
                raise ValueError("it is not a safetensors file, or it is cut off")
            tensors, end = _parse(stream.read(length), str(file))
        if 8 + length + end != size:
            raise ValueError(f"it has {size} bytes instead of the {8 + length + end} of its header and its tensors")
    except (ValueError, OSError) as error:
        raise ValueError(f"{file} cannot be read ({error}): {DAMAGED}") from None
    return tensors


def _parse(header: bytes, file: str) -> tuple[dict[str, TensorInfo], int]:
    """The tensors of a header, and the bytes of them all. Raises `ValueError` where it contradicts itself."""
    try:
        entries = _load_json(header)
    except ValueError as error:
        raise ValueError(f"its header {error}") from None
    metadata = entries.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"its header has __metadata__ {str(metadata)[:80]}, which must be a dict of texts")
    tensors, spans = {}, []
    for name, entry in entries.items():
        try:
            shape, dtype, (begin, stop) = tuple(entry["shape"]), entry["dtype"], entry["data_offsets"]
            known = isinstance(dtype, str) and dtype in _TYPES and all(map(_is_count, (*shape, begin, stop)))
        except (KeyError, TypeError, ValueError):
            known = False
        if not known:
            raise ValueError(f"its header has {str(entry)[:80]} for {name[:80]!r}")
        tensors[name] = info = TensorInfo(shape, dtype, file, name)
        if stop - begin != info.bytes:
            raise ValueError(f"{name} is {dtype} {list(shape)}, for which its header has {stop - begin} bytes")
        spans.append((begin, stop))
    end = 0
    for begin, stop in sorted(spans):
        if begin != end:
            raise ValueError("its tensors overlap or have gaps between them")
        end = stop
    return tensors, end


def read_json(path: str | Path) -> dict[str, Any]:
    """The content of a file of one JSON object. Raises `ValueError` if it does not exist or holds something else."""
    try:
        value = _load_json(Path(path).read_bytes())
        if _is_deep(value):
            raise ValueError("is nested too deeply")
        return value
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except ValueError as error:
        raise ValueError(f"{path} {error}: {DAMAGED}") from None


def _load_json(content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError("is not a JSON object")
    return value


def _is_deep(value: Any, limit: int = 100) -> bool:
    """Whether lists and objects are nested so deeply that walking through them by recursion could fail."""
    level = [value]
    for _ in range(limit):
        level = [
            item
            for container in level
            if isinstance(container, (dict, list))
            for item in (container.values() if isinstance(container, dict) else container)
        ]
        if not level:
            return False
    return True


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
