"""Loading a checkpoint of another package: its tensors are re-packed one linear at a time, as Transformers reads them."""

from __future__ import annotations

import copy
import functools
import logging
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..checkpoints import memory
from ..checkpoints.complete import check_complete
from ..checkpoints.files import Files, expand_weights, find_weights, unreadable
from ..checkpoints.finite import check_small_finite
from ..checkpoints.foreign.exl3 import Exl3
from ..checkpoints.foreign.exl3_storage import check_codes
from ..checkpoints.foreign.family import is_one_of
from ..checkpoints.foreign.plan import METHODS, ForeignLinear, ForeignPlan, make_plan
from ..checkpoints.headers import DAMAGED, read_json
from ..checkpoints.sizes import check_layers
from ..config import QUANT_METHOD, QuipConfig
from .undescribed import check_described

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

# Where some packages keep the quantization_config, or a copy of it.
BESIDE = "quantization_config.json"
_ORIGINAL = "_transformers_quip_original"
# Whether what `from_pretrained` loads is a foreign checkpoint.
_loads_foreign: ContextVar[bool] = ContextVar("loads_foreign", default=False)
# What `from_pretrained` loads: the name of a folder or repository, and the arguments.
_source: ContextVar[tuple[str | None, Mapping[str, Any]]] = ContextVar("source", default=(None, {}))
# Those that say where on the Hub, and how to get there.
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class ForeignConfig(QuantizationConfigMixin):
    """What Transformers makes of the quantization_config of a foreign checkpoint: a `QuipConfig` that carries it along."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The config with which the checkpoint is loaded; its native one is known when its files have been seen."""
        config = QuipConfig(dataset=None)
        config.foreign = dict(config_dict)
        return (config, kwargs) if return_unused_kwargs else config


class RaisedLater(dict):
    """In the place of tensors: lets the loader itself raise the error, as soon as it asks for them.

    The loader catches what an op raises, goes on with all other weights (hours, for a large model), and at the end
    raises an error that names none of it.
    """

    def __init__(self, error: Exception):
        super().__init__()
        self.error = error

    def items(self) -> Iterator:
        raise self.error


def plan_for(model: PreTrainedModel, parameters: Mapping[str, Any], files: Files) -> ForeignPlan:
    """Where everything in a foreign checkpoint goes in this model; see `checkpoints.foreign.make_plan`."""
    rules = copy.deepcopy(get_model_conversion_mapping(model))  # renaming a key marks the rules as used
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    renamed = {rename_source_key(key, renamings, [])[0]: info for key, info in files.headers.items()}
    return make_plan(model, parameters, renamed, files.read, names_in_model(model, files.headers, rules))


def names_in_model(
    model: PreTrainedModel, headers: Mapping[str, Any], conversions: list, whole: bool = False
) -> dict[str, Any]:
    """The same tensors under the names that they will have in the model, as Transformers' loader renames them.

    Args:
        model: that is going to be loaded.
        headers: by their names in the files.
        conversions: Transformers' `WeightRenaming`s and `WeightConverter`s for this model. A tensor that a converter
            splits appears under each name (with the shape that it has in the file).
        whole: whether an expert that is missing among those that Transformers stacks is an error.

    Raises:
        ValueError: see `whole`.
    """
    conversions = copy.deepcopy(list(conversions))  # renaming a key marks the rules as used
    renamings = [rule for rule in conversions if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in conversions if isinstance(rule, WeightConverter)]
    state = model.state_dict()
    result, stacked = {}, defaultdict(list)
    for key, info in headers.items():
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if name not in state and key in state:
            name, pattern = key, None
        result[name] = info
        if pattern is not None:
            converter = next(rule for rule in converters if pattern in rule.source_patterns)
            first, *others = converter.target_patterns
            result.update((name.replace(first, other), info) for other in others)
            if "*" in pattern:
                stacked[name, pattern].append(key)
    for (name, _), keys in stacked.items():
        if whole and name in state:
            _check_stack(keys, len(state[name]))
    return result


def _check_stack(keys: list[str], count: int) -> None:
    """Raise `ValueError` unless there is a tensor of each expert, from 0 on: Transformers stacks those that it finds."""
    numbers = {int(found[-1]): key for key in keys if (found := re.findall(r"(?<=\.)\d+(?=\.)", key))}
    lost = [number for number in range(count) if number not in numbers]
    if lost and numbers:
        number, key = next(iter(numbers.items()))
        head, _, tail = key.rpartition(f".{number}.")
        raise ValueError(f"The checkpoint has no {head}.{lost[0]}.{tail}, one of {count} that the model stacks: {DAMAGED}")


def check_plan(model: PreTrainedModel, plan: ForeignPlan, files: Files) -> None:
    """Check that the files of a foreign checkpoint and the model belong together as a whole.

    Args:
        model: with the empty quantized modules of the plan in their places.

    Raises:
        ValueError: a tensor of a quantizer has no place, or a weight is missing (see `checkpoints.complete`); or a bias or
            the weight of a norm is not finite.
    """
    used = {info.key for linear in plan.linears for info in linear.source.tensors.values()}
    rest = {key: info for key, info in files.headers.items() if key not in used}
    made = []
    for linear in plan.linears:
        module = None if linear.dense else model.get_submodule(linear.name)
        made += [linear.first] if module is None else [f"{linear.name}.{key}" for key, _ in module.named_parameters()]
    names = names_in_model(model, rest, get_model_conversion_mapping(model), whole=True)
    check_complete(model, names, made)
    check_small_finite(model, names, files.read)
    if any(isinstance(linear.family, Exl3) for linear in plan.linears):
        check_codes(files.headers)


class Repack(ConversionOps):
    """Re-packs the tensors of one linear as the loader has read them."""

    supports_many_to_many = True

    def __init__(self, plan: ForeignPlan, releaser: memory.PageReleaser):
        self.by_target = {linear.first: linear for linear in plan.linears}
        self.releaser = releaser

    def __deepcopy__(self, memo: dict) -> Repack:
        return self  # the loader copies a converter for every linear

    def convert(
        self,
        input_dict: dict[str, Any],
        full_layer_name: str | None = None,
        model: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """Turn {kind: [tensor]} into the native tensors by their full names."""
        linear = self.by_target[full_layer_name]
        tensors = {kind: value[0] if isinstance(value, list) else value for kind, value in input_dict.items()}
        try:
            native = repack(linear, tensors, model)
        except Exception as error:
            return RaisedLater(error)
        self.releaser.handled(sum(tensor.nbytes for tensor in tensors.values()))
        return native


def repack(linear: ForeignLinear, tensors: Mapping[str, torch.Tensor], model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The native tensors of a linear, in the types of the parameters of the model.

    Raises:
        ValueError: they do not fit: the files and the model contradict each other.
    """
    result = {}
    for name, value in linear.repack(tensors).items():
        parameter = model.get_parameter(name)
        if parameter.shape != value.shape or parameter.is_floating_point() != value.is_floating_point():
            raise ValueError(
                f"{name} is re-packed to {value.dtype} {list(value.shape)}, but the model has {parameter.dtype} "
                f"{list(parameter.shape)} there"
            )
        result[name] = value.to(parameter.dtype)
    return result


class RepackingConverter(WeightConverter):
    """Collects the tensors of each quantized linear, by exact names, and has them re-packed."""

    def __init__(self, plan: ForeignPlan, releaser: memory.PageReleaser):
        kinds = sorted({kind for linear in plan.linears for kind in linear.source.keys})
        super().__init__(kinds, [".codes"], [Repack(plan, releaser)])
        self._places = {key: (linear.first, kind) for linear in plan.linears for kind, key in linear.source.keys.items()}

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """(first tensor of the linear in the model, kind of this one), or the key and None."""
        return self._places.get(source_key, (source_key, None))

    def __deepcopy__(self, memo: dict) -> RepackingConverter:
        result = copy.copy(self)  # the table is shared
        result.collected_tensors = copy.deepcopy(self.collected_tensors, memo)
        result.layer_targets = copy.deepcopy(self.layer_targets, memo)
        return result

    def was_used(self) -> bool:
        """No: what is saved afterwards is native, and nothing is to be reversed."""
        return False


def foreign_parameters(config: PretrainedConfig) -> dict[str, Any] | None:
    """The "quip_params" of the config of a QuIP# or QTIP checkpoint, which has no quantization_config; None for others.

    Raises:
        ValueError: it is no dict.
    """
    parameters = getattr(config, "quip_params", None)
    if parameters is not None and not isinstance(parameters, dict):
        raise ValueError(f"config.json has quip_params={parameters!r}, which must be a dict: {DAMAGED}")
    if isinstance(parameters, dict) and getattr(config, "quantization_config", None) is None:
        return parameters
    return None


def parameters_beside(name: str | None, arguments: Mapping[str, Any]) -> dict[str, Any] | None:
    """The quantization_config of a checkpoint that has it in a file beside config.json alone.

    Args:
        name: of its folder or repository.
        arguments: of `from_pretrained`.

    Raises:
        ValueError: the file is no JSON object.
    """
    if name is None or os.path.isfile(name):
        return None
    # Of a repository without that file Transformers' cache remembers that it has none.
    missing = {f"_raise_exceptions_for_{case}": False for case in ("gated_repo", "missing_entries", "connection_errors")}
    path = cached_file(name, BESIDE, **{key: arguments[key] for key in _HUB_ARGUMENTS if key in arguments}, **missing)
    parameters = {} if path is None else read_json(path)
    return parameters if is_one_of(parameters.get("quant_method"), METHODS) else None


def taken_from_another(config: PretrainedConfig, wanted: Any) -> dict[str, Any] | None:
    """The quantization_config of a foreign checkpoint that another package has registered, and that is asked of this one.

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


def check_files(name: str | None, arguments: Mapping[str, Any]) -> None:
    """Raise `ValueError` if the index of a folder's files is damaged, or names files that are not in the folder."""
    if name is None or not os.path.isdir(name) or arguments.get("variant") or arguments.get("use_safetensors") is False:
        return
    found = find_weights(os.path.join(name, arguments.get("subfolder") or ""))
    if found is not None:
        expand_weights(found)


def _original(function: Callable) -> Callable:
    """Transformers' own function, where an earlier import of this file has replaced it."""
    return getattr(function, _ORIGINAL, function)


def _replaces(original: Callable) -> Callable[[Callable], Callable]:
    def mark(function: Callable) -> Callable:
        function = functools.wraps(original)(function)
        setattr(function, _ORIGINAL, original)
        return function

    return mark


def recognise_foreign() -> None:
    """Let `from_pretrained` know checkpoints that say that they are quantized where Transformers does not look.

    Without that it would build the dense model, find none of its weights in the files and return it with random ones.
    Also, let it say which file it is that cannot be read, and never run code that is in one.
    """
    # Its import registers, and that imports this file: whoever imports this file first must not import it in turn.
    from transformers import modeling_utils

    original = _original(modeling_utils.get_hf_quantizer)

    @_replaces(original)
    def get_hf_quantizer(config: PretrainedConfig, quantization_config: Any, *args: Any, **kwargs: Any) -> Any:
        parameters = foreign_parameters(config)
        name, arguments = _source.get()
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
        found = original(config, quantization_config, *args, **kwargs)
        settings = getattr(found[0], "quantization_config", None)
        _loads_foreign.set(getattr(settings, "foreign", None) is not None)
        if isinstance(settings, QuipConfig):
            check_layers(config)
            check_files(name, arguments)
        return found

    modeling_utils.get_hf_quantizer = get_hf_quantizer
    read = _original(modeling_utils.load_state_dict)

    @_replaces(read)
    def load_state_dict(
        checkpoint_file: Any, map_location: Any = "cpu", weights_only: bool = True, *args: Any, **kwargs: Any
    ) -> Any:
        try:
            return read(checkpoint_file, map_location, weights_only or _loads_foreign.get(), *args, **kwargs)
        except Exception as error:
            if isinstance(error, MemoryError) or not _loads_foreign.get():
                raise
            raise unreadable(str(checkpoint_file), error) from None

    modeling_utils.load_state_dict = load_state_dict
    loader = _original(modeling_utils.PreTrainedModel.from_pretrained.__func__)

    @_replaces(loader)
    def from_pretrained(cls: type, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        name = None if pretrained_model_name_or_path is None else str(pretrained_model_name_or_path)
        token = _source.set((name, kwargs))
        try:
            asked = {**kwargs, "output_loading_info": True}
            model, info = loader(cls, pretrained_model_name_or_path, *args, **asked)
        finally:
            _source.reset(token)
        check_described(model, info["missing_keys"], info["unexpected_keys"], name)
        return (model, info) if kwargs.get("output_loading_info") else model

    modeling_utils.PreTrainedModel.from_pretrained = classmethod(from_pretrained)
