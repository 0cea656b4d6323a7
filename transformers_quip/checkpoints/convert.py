"""Write the files of a foreign checkpoint as a native one, tensor by tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .companions import companions
from .files import Files
from .foreign.plan import ForeignPlan
from .foreign.repack import ForeignLinear, repack
from .headers import TensorInfo, is_supported, read_json, supported_types, torch_dtype
from .memory import PageReleaser
from .writer import Step, write

_REPLACED = ("config.json", "quantization_config.json")


def write_native(
    folder: Path, target: Path, model: Any, plan: ForeignPlan, files: Files, paths: Sequence[str], shard_size: int
) -> None:
    """Write the native form of a foreign checkpoint; see `hf.convert.convert`.

    Args:
        folder: of the checkpoint.
        target: an empty folder.
        model: on the meta device, with the empty quantized linears of the plan in place.
        plan: where every quantized linear of the checkpoint goes.
        files, paths: the checkpoint's files of weights.
        shard_size: bytes of tensors in one file.

    Raises:
        ValueError: a tensor has a type that is not supported, or the files are damaged.
        OSError: the disk is full, for example.
    """
    releaser = PageReleaser(paths)
    steps = [_releasing(step, releaser) for step in _steps(model, plan, files)]
    write(target, steps, shard_size)
    for file in companions(folder):
        if file.name not in _REPLACED:
            shutil.copyfile(file, target / file.name)
    _write_config(folder, target, plan.config.to_dict(), untied=not model.config.tie_word_embeddings)


def _steps(model: nn.Module, plan: ForeignPlan, files: Files) -> Iterator[Step]:
    """Each dense tensor as it is, then the tensors of each quantized linear together."""
    used = {info.key for linear in plan.linears for info in linear.source.tensors.values()}
    for key, info in files.headers.items():
        if key in used:
            continue
        if not is_supported(info.dtype):
            types = ", ".join(supported_types())
            raise ValueError(f"{key} is of type {info.dtype}, which is not supported; types are {types}")
        yield Step({key: (info.shape, torch_dtype(info.dtype))}, partial(_read_one, key, info, files))
    for linear in plan.linears:
        yield Step(_expected(linear, model), partial(_repacked, linear, files, model))


def _read_one(key: str, info: TensorInfo, files: Files) -> dict[str, torch.Tensor]:
    return {key: files.read(info)}


def _repacked(linear: ForeignLinear, files: Files, model: nn.Module) -> dict[str, torch.Tensor]:
    return repack(linear, {kind: files.read(info) for kind, info in linear.source.tensors.items()}, model)


def _releasing(step: Step, releaser: PageReleaser) -> Step:
    """The same step, after which the pages of the files are given back."""

    def make() -> Mapping[str, torch.Tensor]:
        releaser.handled(step.size)
        return step.make()

    return Step(step.expected, make)


def _expected(linear: ForeignLinear, model: nn.Module) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of the native tensors of a linear, as the model without weights has them."""
    if linear.dense:
        parameter = model.get_parameter(linear.first)
        return {linear.first: (tuple(parameter.shape), parameter.dtype)}
    module = model.get_submodule(linear.name)
    return {f"{linear.name}.{key}": (tuple(p.shape), p.dtype) for key, p in module.named_parameters()}


def _write_config(folder: Path, target: Path, quantization_config: dict[str, Any], untied: bool) -> None:
    """config.json as it was, with the native description of the quantization."""
    values = read_json(folder / "config.json")
    values.pop("quip_params", None)
    values["quantization_config"] = quantization_config
    if untied:
        values["tie_word_embeddings"] = False
    (target / "config.json").write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
