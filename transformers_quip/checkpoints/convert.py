"""A whole checkpoint of another package on disk → a native one, tensor by tensor, without building its model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..nn.place import place_all
from .claimed import claimed_folder
from .companions import companions
from .files import Files, expand_weights, find_weights
from .foreign.plan import ForeignLinear
from .headers import DAMAGED, is_supported, read_json, supported_types, torch_dtype
from .memory import PageReleaser
from .names import expand_names
from .sizes import check_layers
from .writer import Step, write

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_REPLACED = ("config.json", "quantization_config.json")


def convert(
    source: str | Path, destination: str | Path, shard_size: int = 5 * 10**9, trust_remote_code: bool = False
) -> None:
    """Re-pack a checkpoint of QuIP#, QuIP-for-all, QTIP or EXL3 into the native format, without loss.

    Memory holds the tensors of one linear, and a model without weights, which tells the shapes. Tensors that are not
    quantized are copied unchanged, and so are the tokenizer and other files that belong to the model (see `companions`).

    Args:
        source: a folder, or the name of a repository on the Hub.
        destination: a folder that is empty or does not exist.
        shard_size: bytes of tensors in one file.
        trust_remote_code: whether code of the repository may be run, for architectures that Transformers does not know.

    Raises:
        ValueError: the checkpoint is of none of these kinds, of a kind that is not supported, or damaged; or there is
            something in the destination.
        OSError: the disk is full, for example. After any error the destination is as it was, except for files that
            another program has written into it.
    """
    folder, target = _folder(source), Path(destination)
    with claimed_folder(target, last="config.json") as work:  # a folder without it is not a model
        _convert(folder, work, shard_size, trust_remote_code)


def _convert(folder: Path, target: Path, shard_size: int, trust_remote_code: bool) -> None:
    """Write the native checkpoint into an empty folder."""
    # imported late: Transformers and higher packages are needed for whole checkpoints only
    from transformers import AutoConfig, AutoModelForCausalLM

    from ..hf.foreign import check_plan, plan_for, repack

    read_json(folder / "config.json")  # Transformers' own errors do not say which file it is, or what to do
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        check_layers(config)
        parameters = _parameters(folder, config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (MemoryError, OSError, ImportError):
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {error}"[:500]
        raise ValueError(f"No model can be built from {folder / 'config.json'} ({said}): {DAMAGED}") from error
    paths = _weight_files(folder)
    files, releaser = Files(paths), PageReleaser(paths)
    plan = plan_for(model, parameters, files)
    place_all(model, expand_names(plan.config.quantized_modules), plan.config)
    check_plan(model, plan, files)

    steps = []
    used = {info.key for linear in plan.linears for info in linear.source.tensors.values()}
    for key, info in files.headers.items():
        if key not in used:
            if not is_supported(info.dtype):
                raise ValueError(
                    f"{key} is of type {info.dtype}, which is not supported; types are {', '.join(supported_types())}"
                )
            steps.append(
                Step({key: (info.shape, torch_dtype(info.dtype))}, lambda key=key, info=info: {key: files.read(info)})
            )
    for linear in plan.linears:
        steps.append(Step(_expected(linear, model), lambda linear=linear: repack(linear, _read(linear, files), model)))
    steps = [_returning(step, releaser) for step in steps]
    write(target, steps, shard_size)
    for file in companions(folder):
        if file.name not in _REPLACED:
            shutil.copyfile(file, target / file.name)
    _write_config(folder, target, plan.config.to_dict(), untied=not model.config.tie_word_embeddings)


def _returning(step: Step, releaser: PageReleaser) -> Step:
    """The same step, after which memory is given back."""

    def make() -> Mapping[str, torch.Tensor]:
        releaser.handled(step.size)
        return step.make()

    return Step(step.expected, make)


def _folder(source: str | Path) -> Path:
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(source)))


def _parameters(folder: Path, config: Any) -> dict[str, Any]:
    """The checkpoint's description of its quantization, from any of the places where packages store it."""
    file = folder / "quantization_config.json"
    for parameters in (
        getattr(config, "quantization_config", None),
        getattr(config, "quip_params", None),
        read_json(file) if file.is_file() else None,
    ):
        if isinstance(parameters, dict):
            if parameters.get("quant_method") == "quip":
                raise ValueError(f"{folder} is in the native format of transformers-quip already")
            return parameters
    raise ValueError(
        f"{folder} is not a quantized checkpoint: its config.json has neither quantization_config nor quip_params"
    )


def _weight_files(folder: Path) -> list[str]:
    """The files of weights, as Transformers would choose them."""
    found = find_weights(folder)
    if found is None:
        raise ValueError(f"{folder} has neither model.safetensors nor pytorch_model.bin, nor an index of several files")
    return expand_weights(found)


def _expected(linear: ForeignLinear, model: PreTrainedModel) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of the native tensors of a linear, as the model without weights has them."""
    if linear.dense:
        parameter = model.get_parameter(linear.first)
        return {linear.first: (tuple(parameter.shape), parameter.dtype)}
    module = model.get_submodule(linear.name)
    return {f"{linear.name}.{key}": (tuple(p.shape), p.dtype) for key, p in module.named_parameters()}


def _read(linear: ForeignLinear, files: Files) -> dict[str, torch.Tensor]:
    return {kind: files.read(info) for kind, info in linear.source.tensors.items()}


def _write_config(folder: Path, target: Path, quantization_config: dict[str, Any], untied: bool) -> None:
    """config.json as it was, with the native description of the quantization."""
    values = read_json(folder / "config.json")
    values.pop("quip_params", None)
    values["quantization_config"] = quantization_config
    if untied:
        values["tie_word_embeddings"] = False
    (target / "config.json").write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
