"""A whole checkpoint of another package → a native one, or a native one → EXL3, without building its model in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping

from ..checkpoints.claimed import claimed_folder
from ..checkpoints.convert import write_native
from ..checkpoints.convert_exl3 import exl3_modules, write_exl3
from ..checkpoints.files import Files
from ..checkpoints.headers import DAMAGED, check_is_there, read_json
from ..checkpoints.names import expand_names
from ..checkpoints.native import check_kind
from ..checkpoints.sizes import check_layers
from ..config import QUANT_METHOD, QuipConfig
from ..nn.place import place_all
from .dense import weight_files
from .foreign import check_plan, plan_for
from .loader import names_in_source
from .native import check_native, place_native
from .recognise import BESIDE

# What a checkpoint can be converted into.
FORMATS = ("native", "exl3")


def convert(
    source: str | Path,
    destination: str | Path,
    shard_size: int = 5 * 10**9,
    trust_remote_code: bool = False,
    to: str = "native",
) -> None:
    """Re-pack a checkpoint of QuIP#, QuIP-for-all, QTIP or EXL3 into the native format, without loss, or that into EXL3.

    EXL3 (exllamav3 1.6) holds trellis codes of order exl3 between transforms "hadamard-128". Its scales are float16: those
    of a model that was EXL3 before are written without loss, others are rounded.

    Memory holds the tensors of one linear, and a model without weights, which tells the shapes. Tensors that are not
    quantized are copied unchanged, and so are the tokenizer and other files of the model (see `checkpoints.companions`).

    Args:
        source: a folder, or the name of a repository on the Hub.
        destination: a folder that is empty or does not exist.
        shard_size: bytes of tensors in one file.
        trust_remote_code: whether code of the repository may be run, for architectures that Transformers does not know.
        to: "native" or "exl3".

    Raises:
        ValueError: the checkpoint is of none of these kinds, of a kind that is not supported, or damaged; EXL3 cannot hold
            one of its modules (the message names it and the remedy); or the destination is not empty.
        OSError: the disk is full, for example. After any error the destination is as it was, except for files that
            another program has written into it.
    """
    if to not in FORMATS:
        raise ValueError(f"to={to!r} must be one of {', '.join(FORMATS)}")
    folder, target = _folder(source), Path(destination)
    with claimed_folder(target, last="config.json") as work:  # a folder without it is not a model
        (_to_exl3 if to == "exl3" else _to_native)(folder, work, shard_size, trust_remote_code)


def _to_native(folder: Path, target: Path, shard_size: int, trust_remote_code: bool) -> None:
    """Write the native checkpoint into an empty folder."""
    config = _config(folder, trust_remote_code)
    parameters = _parameters(folder, config)
    model = _meta_model(folder, config, trust_remote_code)
    paths = weight_files(folder)
    files = Files(paths)
    plan = plan_for(model, parameters, files)
    place_all(model, expand_names(plan.config.quantized_modules), plan.config)
    check_plan(model, plan, files)
    write_native(folder, target, model, plan, files, paths, shard_size)


def _to_exl3(folder: Path, target: Path, shard_size: int, trust_remote_code: bool) -> None:
    """Write the EXL3 form of a native checkpoint into an empty folder."""
    config = _config(folder, trust_remote_code)
    parameters = getattr(config, "quantization_config", None)
    if not isinstance(parameters, dict) or parameters.get("quant_method") != QUANT_METHOD:
        raise ValueError(
            f"{folder} is not in the native format of transformers-quip, from which EXL3 is written: quantize the model, "
            "or convert it into the native format first"
        )
    settings = QuipConfig.from_dict(parameters)
    model = _meta_model(folder, config, trust_remote_code)
    place_native(model, settings)
    paths = weight_files(folder)
    check_kind(paths)
    files = Files(paths)
    names, in_source = check_native(model, files, get_model_conversion_mapping(model)), names_in_source(model)
    write_exl3(folder, target, model, exl3_modules(model, names, in_source), names, in_source, files, shard_size)


def _config(folder: Path, trust_remote_code: bool) -> Any:
    """The config of a model (a `PretrainedConfig`)."""
    read_json(folder / "config.json")  # its error names the file, whatever is in it
    with _naming(folder / "config.json"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    check_layers(config)
    return config


def _meta_model(folder: Path, config: Any, trust_remote_code: bool) -> Any:
    """The dense model without weights."""
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with _naming(folder / "config.json"), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Turns errors of Transformers, which do not name the file, into a `ValueError` that does."""
    try:
        yield
    except (OSError, ImportError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(f"{file} cannot be used ({type(error).__name__}: {str(error)[:200]}): {DAMAGED}") from error


def _folder(source: str | Path) -> Path:
    if Path(source).is_dir():
        return Path(source)
    check_is_there(source)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(source)))


def _parameters(folder: Path, config: Any) -> dict[str, Any]:
    """The checkpoint's description of its quantization, from any of the places where packages store it."""
    file = folder / BESIDE
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
