"""Check the claims of a folder before Transformers acts on them: its quantization method, and its files of weights.

Transformers ignores a method that it does not know, and fills the model with random weights.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..checkpoints.complete import MARKERS
from ..checkpoints.files import expand_weights, find_weights
from ..checkpoints.foreign.family import is_one_of
from ..checkpoints.foreign.plan import METHODS
from ..checkpoints.headers import DAMAGED, read_headers, read_json
from ..config import QUANT_METHOD

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def check_method(config: PretrainedConfig) -> None:
    """Raise `ValueError` for a quantization_config whose method is not a name, or that is of two methods.

    Transformers takes the first for no quantization and loads random weights; of the second it does not ask ours.
    """
    parameters = getattr(config, "quantization_config", None)
    if not isinstance(parameters, dict):
        return
    method = parameters.get("quant_method")
    others = [key for key in ("load_in_8bit", "load_in_4bit") if parameters.get(key)]
    if "quant_method" in parameters and not (isinstance(method, str) and method.strip()):
        raise ValueError(
            f"config.json has quant_method={str(method)[:80]!r}, which must be the name of a method: {DAMAGED}"
        )
    if others and is_one_of(method, (QUANT_METHOD, *METHODS)):
        raise ValueError(f"config.json has quant_method={method!r} and {others[0]}, which is of another method: {DAMAGED}")


def check_not_ours(parameters: Any, name: str | None, arguments: Mapping[str, Any]) -> None:
    """Raise `ValueError` if a checkpoint whose method nobody knows holds tensors of the methods that are read here.

    Transformers would load it as if it was not quantized, with random weights.

    Args:
        parameters: its quantization_config.
        name: of its folder or repository. Repositories are not looked at.
        arguments: of `from_pretrained`.
    """
    found = None
    if name is not None and os.path.isdir(name):
        found = find_weights(os.path.join(name, arguments.get("subfolder") or ""))
    files = [file for file in expand_weights(found) if file.endswith(".safetensors")] if found is not None else []
    key = next((key for key in read_headers(files) if key.rpartition(".")[2] in MARKERS), None)
    if key is not None:
        method = parameters.get("quant_method") if isinstance(parameters, dict) else None
        raise ValueError(
            f"config.json has quant_method={method!r}, which nobody knows, and the files have {key}: the methods that are "
            f"read here are {', '.join(map(repr, (QUANT_METHOD, *METHODS)))}, and {DAMAGED}"
        )


def check_files(name: str | None, arguments: Mapping[str, Any]) -> None:
    """Raise `ValueError` if the index of a folder's files is damaged, or names files that are not in the folder."""
    if name is None or not os.path.isdir(name) or arguments.get("variant") or arguments.get("use_safetensors") is False:
        return
    found = find_weights(os.path.join(name, arguments.get("subfolder") or ""))
    if found is None:
        return
    expand_weights(found)
    if found.suffix == ".json" and not isinstance(read_json(found).get("metadata"), dict):
        raise ValueError(f"{found} has no metadata, which Transformers needs (it may be {{}}): {DAMAGED}")
