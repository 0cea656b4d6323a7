"""Write the files of a native checkpoint as an EXL3 one, as exllamav3 1.6 reads it, tensor by tensor."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..codebooks.trellis import Trellis
from ..nn.embedding import QuipEmbedding
from ..nn.experts import QuipExperts
from ..nn.fused import FusedRows, JoinedLinear
from ..nn.replace import quantized_modules
from ..nn.unstacked import can_unstack
from .companions import companions
from .files import Files
from .foreign.exl3_folded import folded_factor
from .foreign.exl3_write import ExlModule, Expected, check_together, stored
from .headers import TensorInfo, is_supported, read_json, torch_dtype
from .writer import Step, write

# The version of exllamav3 whose files these are.
VERSION = "1.6.5"
# Types of dense tensors that exllamav3 reads.
_READ = ("F16", "BF16", "F32", "I8", "U8", "I16", "I32", "I64", "F8_E4M3", "F8_E5M2")
# Linears of Transformers that EXL3 files hold under other names or in parts.
_OTHER_NAMES = ("w1", "w2", "w3", "qkv_proj", "gate_up_proj", "query_key_value", "Wqkv")


def exl3_modules(model: Any, names: Mapping[str, TensorInfo], in_source: Callable[[str], str]) -> list[ExlModule]:
    """The quantized modules of a native model as EXL3 holds them.

    Args:
        model: with its quantized modules in place, on the meta device or not.
        names: the checkpoint's tensors by their names in the model.
        in_source: gives the name that a tensor has in the architecture's own checkpoints.

    Raises:
        ValueError: the format cannot hold one of them, or the architecture is one whose names in EXL3 are not known; the
            message names the module and the remedy.
    """
    if model.config.get_text_config() is not model.config:
        raise ValueError(
            f"{type(model).__name__} has several parts, such as text and images, whose names in EXL3 files differ from "
            "Transformers': convert the text model alone"
        )
    for name, module in model.named_modules():
        if isinstance(module, FusedRows):
            raise ValueError(f"{name} is stored as a part of a fused linear, for which EXL3 has no form")
        if can_unstack(module):
            raise ValueError(f"{name}: exllamav3 reads quantized experts alone, and these are dense: quantize them")
    result = []
    for name, module in quantized_modules(model).items():
        if isinstance(module, QuipExperts):
            raise ValueError(
                f"{name}: these experts are quantized as stacks, gate and up as one matrix, for which EXL3 has no form: "
                "keep the native format"
            )
        bias = names.get(f"{name}.bias")
        parent, _, last = name.rpartition(".")
        if isinstance(model.get_submodule(parent), JoinedLinear):
            name = f"{parent.rpartition('.')[0]}.{last}"  # EXL3 has the parts only
        if last in _OTHER_NAMES:
            raise ValueError(f"{name} has another name in EXL3 files, or is split there, and no form of it is known here")
        name = in_source(f"{name}.weight").removesuffix(".weight")
        dtype = None if bias is None else torch_dtype(bias.dtype)
        found = ExlModule(name, module, folded_factor(model.config, name), dtype)
        found.check()
        result.append(found)
    check_together(result)
    _check_dense_factors(model, names)
    return result


def _check_dense_factors(model: Any, names: Iterable[str]) -> None:
    """Refuse a dense weight where exllamav3 folds a factor into quantized ones: whether it does it there is not known."""
    for name in names:
        if name.endswith(".weight") and folded_factor(model.config, name.removesuffix(".weight")) != 1:
            raise ValueError(
                f"{name} is dense, and exllamav3 folds a factor into the weights of that name in {type(model).__name__}: "
                "quantize it as well"
            )


def write_exl3(
    folder: Path,
    target: Path,
    model: Any,
    modules: Sequence[ExlModule],
    names: Mapping[str, TensorInfo],
    in_source: Callable[[str], str],
    files: Files,
    shard_size: int,
) -> None:
    """Write the EXL3 form of a native checkpoint.

    Args:
        folder: of the checkpoint.
        target: an empty folder.
        model: see [`exl3_modules`], whose result `modules` is.
        names, in_source: see [`exl3_modules`].
        files: the checkpoint's files.
        shard_size: bytes of tensors in one file.

    Raises:
        ValueError: a tensor has a type that exllamav3 does not read, or a number that float16 cannot hold.
        OSError: the disk is full, for example.
    """
    places = {id(module): name for name, module in model.named_modules()}
    used, steps = set(), []
    for module in modules:
        parts = dict(module.module.named_parameters())
        here = {key: names[f"{places[id(module.module)]}.{key}"] for key in parts}
        used |= {info.key for info in here.values()}
        steps.append(Step(module.expected(), partial(module.make, partial(_read, files, here))))
    dense: dict[str, Expected] = {}
    for key, info in files.headers.items():
        if info.key in used:
            continue
        # a converted checkpoint has the makers' names, and a saved one may have the model's
        key = in_source(key) if key in names else key
        if info.dtype not in _READ or not is_supported(info.dtype):
            raise ValueError(f"{key} is of type {info.dtype}, which exllamav3 does not read; types are {', '.join(_READ)}")
        expected = {key: (info.shape, torch_dtype(info.dtype))}
        dense.setdefault(key.rpartition(".")[0], {}).update(expected)
        steps.append(Step(expected, partial(_read_one, files, key, info)))
    write(target, steps, shard_size)
    quantization = _quantization(model, modules)
    storage = {module.name: module.described() for module in modules}
    storage |= {name: stored(tensors) for name, tensors in dense.items() if name not in storage}
    for file in companions(folder):
        if file.name not in ("config.json", "quantization_config.json"):
            shutil.copyfile(file, target / file.name)
    _write_json(target / "quantization_config.json", quantization | {"tensor_storage": storage})
    _write_json(target / "config.json", _config(folder, model, quantization, _has_head(model, {*dense, *storage})))


def _read(files: Files, infos: Mapping[str, TensorInfo], kind: str) -> torch.Tensor:
    return files.read(infos[kind])


def _read_one(files: Files, key: str, info: TensorInfo) -> dict[str, torch.Tensor]:
    return {key: files.read(info)}


def _has_head(model: Any, there: Iterable[str]) -> bool:
    """Whether the file has the output embeddings, which are then tied to nothing."""
    head = model.get_output_embeddings()
    return any(module is head and name in there for name, module in model.named_modules())


def _quantization(model: Any, modules: Sequence[ExlModule]) -> dict[str, Any]:
    """The quantization_config: what holds for most linears; exllamav3 goes by the tensors of each."""
    head = model.get_output_embeddings()
    linears = [module for module in modules if not module.is_table]
    inside = [module for module in linears if module.module is not head] or linears
    weights = [module.padded[0] * module.padded[1] for module in inside]
    bits = sum(module.bits * size for module, size in zip(inside, weights, strict=True)) / sum(weights)
    codes = Counter(module.book.code for module in linears if isinstance(module.book, Trellis))
    return {
        "quant_method": "exl3",
        "version": VERSION,
        "bits": round(bits, 4),
        "head_bits": next((module.bits for module in linears if module.module is head), 16),
        "codebook": codes.most_common(1)[0][0],
    }


def _config(folder: Path, model: Any, quantization: dict[str, Any], has_head: bool) -> dict[str, Any]:
    """config.json as it was, with this quantization_config."""
    values = read_json(folder / "config.json")
    values["quantization_config"] = quantization
    values["architectures"] = [type(model).__name__]  # exllamav3 wants exactly one
    if has_head:
        values["tie_word_embeddings"] = False
    elif isinstance(model.get_input_embeddings(), QuipEmbedding):
        raise ValueError("The model has a quantized table and no head of its own, and EXL3 stores one next to it")
    return values


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
