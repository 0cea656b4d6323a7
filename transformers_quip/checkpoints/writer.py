"""Write safetensors files without holding them in memory: the header first, then one tensor at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from .headers import type_name


@dataclass(frozen=True)
class Step:
    """Some tensors that are made together.

    Attributes:
        expected: shape and dtype of each by its name.
        make: makes them.
    """

    expected: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    make: Callable[[], Mapping[str, torch.Tensor]]

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.expected.values())


def write(folder: Path, steps: Sequence[Step], shard_size: int) -> None:
    """Write a checkpoint as Transformers reads it, with a progress bar; memory holds the tensors of one step.

    Args:
        folder: an existing folder.
        steps: at least one.
        shard_size: most bytes of tensors in one file; only a single larger step exceeds it.

    Raises:
        ValueError: a step made other tensors than it said.
        OSError: a file cannot be written, for example because the disk is full; it does not exist then.
    """
    shards = _shards(steps, shard_size)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    with tqdm(total=len(steps), desc="Re-packing", unit="linear") as bar:
        for name, shard in zip(names, shards, strict=True):
            _write_shard(folder / name, shard, bar)
    if len(shards) > 1:
        places = {key: name for name, shard in zip(names, shards, strict=True) for step in shard for key in step.expected}
        index = {"metadata": {"total_size": sum(step.size for step in steps)}, "weight_map": dict(sorted(places.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(steps: Sequence[Step], limit: int) -> list[list[Step]]:
    shards: list[list[Step]] = [[]]
    size = 0
    for step in steps:
        if shards[-1] and size + step.size > limit:
            shards.append([])
            size = 0
        shards[-1].append(step)
        size += step.size
    return shards


def _write_shard(path: Path, steps: Sequence[Step], bar: tqdm) -> None:
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for step in steps:
        for name, (shape, dtype) in step.expected.items():
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": type_name(dtype), "shape": list(shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format aligns its data
    unfinished = path.with_name(f"{path.name}.partial")  # a truncated file must not look complete
    with unfinished.open("wb") as file:

        def put(content: bytes | memoryview) -> None:
            try:
                file.write(content)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(path)) from None

        put(len(encoded).to_bytes(8, "little") + encoded)
        for step in steps:
            made = step.make()
            for name, (shape, dtype) in step.expected.items():
                tensor = made[name]
                if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                    raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)} instead of {dtype} {list(shape)}")
                if tensor.numel():
                    put(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
            bar.update()
    unfinished.replace(path)
