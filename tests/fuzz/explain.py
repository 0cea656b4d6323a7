"""Whether a changed checkpoint may compute other numbers: decided by comparing it with the sound one, byte by byte.

Nothing of the package is used, and nothing of what the mutation says of itself. [`config_damage`] and [`weight_damage`]
list the errors of the changed checkpoint, in itself and against its description. Where both are empty, no check could know:
codes and finite scales that are other codes and finite scales, options that are possible for these tensors, and everything
in config.json that is Transformers' own.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .raw import FLOATS, TYPES, decode

# Tensors that are not weights but say what the weights are: there is one right value.
_MARKERS = ("codebook_id", "mcg", "mul1")
_PARTS = ("quantization_config", "quip_params")
_ABSENT = object()
_TRANSFORMS = ("hadamard", "kronecker", "none", "stored", "hadamard-128")
_CODEBOOKS = ("e8p", "e8p-rvq3", "e8p-rvq4", "d4", "half-integer", "scalar2", "scalar3", "scalar4", "scalar8")


class Stored(NamedTuple):
    """A tensor as it lies in a file."""

    dtype: str
    shape: tuple[int, ...]
    content: bytes


def config_damage(before: Path, after: Path) -> list[str]:
    """Everything in the description of `after` for which it should not load, or should compute what `before` does.

    Args:
        before: the sound checkpoint.
        after: the changed one.
    """
    try:
        old, new = _description(before), _description(after)
    except ValueError as error:
        return [f"the config: {error}"]
    if not isinstance(new, dict):
        return ["the config does not describe a quantization"]
    return [
        f"the config has {str(value)[:60]!r} for {'.'.join(map(str, path))[:80]}"
        for path, was, value in _differences(old, new, ())
        if not _is_possible(path, was, value)
    ]


def weight_damage(before: Path, after: Path) -> list[str]:
    """The same for the files of weights."""
    try:
        new = tensors(after)
    except ValueError as error:
        return [str(error)]
    old, found = tensors(before), []
    found += [f"{name} is lost" for name in old.keys() - new.keys()]
    found += [f"{name} is new" for name in new.keys() - old.keys()]
    for name in old.keys() & new.keys():
        if old[name] != new[name]:
            found += _value_damage(name, old[name], new[name])
    return found


def _value_damage(name: str, old: Stored, new: Stored) -> Iterator[str]:
    kind = name.rpartition(".")[2]
    floating = old.dtype in FLOATS and new.dtype in FLOATS
    if new.shape != old.shape or not (new.dtype == old.dtype or floating):
        yield f"{name} is {new.dtype} {list(new.shape)} instead of {old.dtype} {list(old.shape)}"
    elif kind in _MARKERS:
        yield f"{name} has another value"
    elif floating and (kind != "weight" or len(new.shape) < 2) and not _is_finite(new):
        yield f"{name} is not finite"


def _is_finite(stored: Stored) -> bool:
    return all(map(math.isfinite, decode(stored.content, stored.dtype)))


# The files


def tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint, from the files that its names and its index choose.

    Raises:
        ValueError: they contradict themselves.
    """
    for single, index, read in (
        ("model.safetensors", "model.safetensors.index.json", read_safetensors),
        ("pytorch_model.bin", "pytorch_model.bin.index.json", _read_bin),
    ):
        if (folder / single).is_file():
            return read(folder / single)
        if (folder / index).is_file():
            return _read_shards(folder, folder / index, read)
    raise ValueError("no weights")


def _read_shards(folder: Path, index: Path, read: Any) -> dict[str, Stored]:
    content = _json(index)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise ValueError("the index has no map")
    result: dict[str, Stored] = {}
    for name in sorted(set(places.values())):
        path = folder / name
        if "\0" in name or folder.resolve() not in path.resolve().parents or not path.is_file():
            raise ValueError(f"{name!r:.80} of the index is not a file of the folder")
        there = read(path)
        twice = [key for key in there.keys() & result.keys() if there[key] != result[key]]
        if twice:
            raise ValueError(f"{twice[0]} is in two files, and not the same")
        result |= there
    return result


def read_safetensors(path: Path) -> dict[str, Stored]:
    """Every tensor of a file, by the format's description. Raises `ValueError` where the file does not follow it."""
    with path.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        total = path.stat().st_size
        if not 2 <= length <= min(10**8, total - 8):
            raise ValueError(f"{path.name} has no header")
        header = _parse(stream.read(length))
        if not isinstance(header, dict):
            raise ValueError(f"{path.name} has no object as its header")
        result, end = {}, 0
        entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
        for name, entry in entries:
            if not _is_entry(entry):
                raise ValueError(f"{name!r:.80} has an odd entry")
        for name, entry in sorted(entries, key=lambda item: item[1]["data_offsets"]):
            begin, stop = entry["data_offsets"]
            size = math.prod(entry["shape"]) * TYPES[entry["dtype"]][1]
            if begin != end or stop - begin != size or 8 + length + stop > total:
                raise ValueError(f"{name!r:.80} lies where it cannot")
            stream.seek(8 + length + begin)
            result[name] = Stored(entry["dtype"], tuple(entry["shape"]), stream.read(size))
            end = stop
        if 8 + length + end != total:
            raise ValueError(f"{path.name} is longer than its tensors")
    return result


def _is_entry(entry: Any) -> bool:
    def whole(values: Any) -> bool:
        return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)

    if not isinstance(entry, dict) or not whole(entry.get("shape")) or not whole(entry.get("data_offsets")):
        return False
    return isinstance(entry.get("dtype"), str) and entry["dtype"] in TYPES and len(entry["data_offsets"]) == 2


def _read_bin(path: Path) -> dict[str, Stored]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path.name} is not read by torch.load: {type(error).__name__}") from None
    names = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
    names |= {torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}
    if not isinstance(loaded, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) and value.dtype in names for key, value in loaded.items()
    ):
        raise ValueError(f"{path.name} has something else than tensors")
    return {
        key: Stored(names[value.dtype], tuple(value.shape), value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        for key, value in loaded.items()
    }


def _json(path: Path) -> Any:
    try:
        return _parse(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path.name} is not read: {error.strerror}") from None


def _parse(content: bytes) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a key is there twice")
        return result

    try:
        return json.loads(content.decode(), object_pairs_hook=once)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


# The description


def _description(folder: Path) -> Any:
    config = _json(folder / "config.json")
    if not isinstance(config, dict):
        raise ValueError("it is not an object")
    for part in _PARTS:
        if config.get(part) is not None:
            return config[part]
    beside = folder / "quantization_config.json"
    return _json(beside) if beside.is_file() else None


def _differences(old: Any, new: Any, path: tuple) -> Iterator[tuple[tuple, Any, Any]]:
    """(place, old value, new value) of every leaf that is not the same."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(key, _ABSENT), new.get(key, _ABSENT), (*path, key))
    elif isinstance(new, dict) and old is _ABSENT and path and path[0] in ("modules", "layout"):
        for key, value in new.items():
            yield from _differences(_ABSENT, value, (*path, key))
    elif isinstance(old, dict) and new is _ABSENT and path and path[0] in ("modules", "layout"):
        for key, value in old.items():
            yield from _differences(value, _ABSENT, (*path, key))
    elif type(old) is not type(new) or (old != new and not (old != old and new != new)):
        yield path, old, new


def _is_possible(path: tuple, old: Any, new: Any) -> bool:
    """Whether a value is one that the tensors of the files could have been written with."""
    key = path[-1]
    if path[0] in ("modules", "layout") and new is _ABSENT:
        return True  # what is said of some modules is optional
    number = isinstance(new, (int, float)) and not isinstance(new, bool) and math.isfinite(new)
    if key == "residual_scale":
        return new is None or number
    if key in ("opt_resid_scale", "resid_scale_override"):
        return new is None or new is _ABSENT or number
    if key == "incoherence" and new is not _ABSENT:
        sides = new if isinstance(new, list) else [new]
        return len(sides) in (1, 2) and all(side in _TRANSFORMS for side in sides if isinstance(side, str))
    if key == "codebook":
        return isinstance(new, str) and (new in _CODEBOOKS or new.startswith("trellis:") or new == new.upper())
    if key in ("seed", "bits", "K", "V", "L", "tlut_bits", "td_x", "td_y", "codesz", "lora_rank", "codebook_version"):
        return number
    if key in ("decode_mode", "scales_dtype"):
        return isinstance(new, str)
    return isinstance(old, bool) and isinstance(new, bool)
