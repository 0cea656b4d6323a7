"""Recognise quantized checkpoints that describe themselves where Transformers does not look, and unreadable files.

The last three functions wrap functions of Transformers; `patches` says which, and why.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils import cached_file

from ..checkpoints.files import unreadable
from ..checkpoints.foreign.family import is_one_of
from ..checkpoints.foreign.plan import METHODS
from ..checkpoints.headers import DAMAGED, read_json
from ..checkpoints.sizes import check_layers
from ..config import QUANT_METHOD, QuipConfig
from .claims import check_files, check_method, check_not_ours
from .methods import ForeignConfig
from .source import LOADED
from .undescribed import check_described

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Where some packages keep the quantization_config, or a copy of it.
BESIDE = "quantization_config.json"
# Whether `from_pretrained` is loading a foreign checkpoint.
_loads_foreign: ContextVar[bool] = ContextVar("loads_foreign", default=False)
# The arguments for the place of a file on the Hub, and for access to it.
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def foreign_parameters(config: PretrainedConfig) -> dict[str, Any] | None:
    """The "quip_params" of the config of a QuIP# or QTIP checkpoint, which has no quantization_config; None for others.

    Raises:
        ValueError: it is not a dict.
    """
    parameters = getattr(config, "quip_params", None)
    if parameters is not None and not isinstance(parameters, dict):
        raise ValueError(f"config.json has quip_params={parameters!r}, which must be a dict: {DAMAGED}")
    if isinstance(parameters, dict) and getattr(config, "quantization_config", None) is None:
        return parameters
    return None


def parameters_beside(name: str | None, arguments: Mapping[str, Any]) -> dict[str, Any] | None:
    """The quantization_config of a checkpoint that has it only in a second file next to config.json.

    Args:
        name: of its folder or repository.
        arguments: of `from_pretrained`.

    Raises:
        ValueError: the file is not a JSON object.
    """
    if name is None or os.path.isfile(name):
        return None
    # If a repository does not have that file, Transformers' cache remembers that.
    missing = {f"_raise_exceptions_for_{case}": False for case in ("gated_repo", "missing_entries", "connection_errors")}
    path = cached_file(name, BESIDE, **{key: arguments[key] for key in _HUB_ARGUMENTS if key in arguments}, **missing)
    parameters = {} if path is None else read_json(path)
    return parameters if is_one_of(parameters.get("quant_method"), METHODS) else None


def taken_from_another(config: PretrainedConfig, wanted: Any) -> dict[str, Any] | None:
    """The quantization_config of a foreign checkpoint whose method another package registered, if this one is asked for.

    It is removed from the model's config, whose method Transformers would give to the other package.

    Args:
        config: of the model.
        wanted: the quantization_config that the caller gave: a `QuipConfig` asks for this package.
    """
    parameters = getattr(config, "quantization_config", None)
    ours = isinstance(wanted, QuipConfig) or (isinstance(wanted, dict) and wanted.get("quant_method") == QUANT_METHOD)
    if not ours or not isinstance(parameters, dict) or not is_one_of(parameters.get("quant_method"), METHODS):
        return None
    if AUTO_QUANTIZATION_CONFIG_MAPPING.get(parameters["quant_method"]) is ForeignConfig:
        return None
    del config.quantization_config
    return parameters


def get_hf_quantizer(original: Callable) -> Callable:
    """Finds the description of a foreign checkpoint, and checks its index of files."""

    def get_hf_quantizer(config: PretrainedConfig, quantization_config: Any, *args: Any, **kwargs: Any) -> Any:
        parameters = foreign_parameters(config)
        name, arguments = LOADED.get()
        if parameters is None and getattr(config, "quantization_config", None) is None and not kwargs.get("gguf_file"):
            parameters = parameters_beside(name, arguments)
        if parameters is None:
            parameters = taken_from_another(config, quantization_config)
        if parameters is not None:
            if not (quantization_config is None or isinstance(quantization_config, (QuipConfig, dict))):
                raise ValueError(
                    f"The checkpoint has quip_params: the model is quantized already, by {parameters.get('codebook')}, and "
                    f"cannot be quantized by {type(quantization_config).__name__}. Load it without quantization_config, or "
                    "with quantization_config=QuipConfig()"
                )
            quantization_config = ForeignConfig.from_dict(parameters)
        check_method(config)
        found = original(config, quantization_config, *args, **kwargs)
        if found[0] is None and getattr(config, "quantization_config", None) is not None:
            check_not_ours(config.quantization_config, name, arguments)
        settings = getattr(found[0], "quantization_config", None)
        _loads_foreign.set(getattr(settings, "foreign", None) is not None)
        if isinstance(settings, QuipConfig):
            check_layers(config)
            check_files(name, arguments)
        return found

    return get_hf_quantizer


def load_state_dict(original: Callable) -> Callable:
    """Reads files of foreign checkpoints as tensors alone, and names the one that cannot be read."""

    def load_state_dict(
        checkpoint_file: Any, map_location: Any = "cpu", weights_only: bool = True, *args: Any, **kwargs: Any
    ) -> Any:
        try:
            return original(checkpoint_file, map_location, weights_only or _loads_foreign.get(), *args, **kwargs)
        except Exception as error:
            if isinstance(error, MemoryError) or not _loads_foreign.get():
                raise
            raise unreadable(str(checkpoint_file), error) from None

    return load_state_dict


def from_pretrained(original: Callable) -> Callable:
    """Remembers the source and the arguments during loading, and refuses a dense model out of quantized weights."""

    def from_pretrained(cls: type, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        name = None if pretrained_model_name_or_path is None else str(pretrained_model_name_or_path)
        token = LOADED.set((name, kwargs))
        try:
            asked = {**kwargs, "output_loading_info": True}
            model, info = original(cls, pretrained_model_name_or_path, *args, **asked)
        finally:
            LOADED.reset(token)
        check_described(model, info["missing_keys"], info["unexpected_keys"], name)
        return (model, info) if kwargs.get("output_loading_info") else model

    return from_pretrained
