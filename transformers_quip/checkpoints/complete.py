"""Loading is complete or refused: every tensor of a quantizer has a module, and every weight comes from a file.

Transformers ignores tensors that no module takes, and fills weights that no file has with random numbers. It only logs a
notice in either case. That is right for fine-tuning, where a task gets a new head. It is wrong for a file that is damaged
or does not belong to its config.json: the model would compute nonsense.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import nn

from ..nn.replace import quantized_modules
from .headers import DAMAGED, TensorInfo

# Last parts of the names of tensors that QuIP quantizers store, in the native format and in other packages. The names of
# a codebook's tensors come from the model's modules. Names that dense modules have too ("weight", "bias", "scale", "A")
# are left out: such a tensor never comes alone.
MARKERS = ("codes", "trellis", "Qidxs")
_NATIVE = ("codes", "su", "sv", "row_scales", "factor_in", "factor_out")
_FOREIGN = ("Qidxs", "SU", "SV", "Wscale", "codebook_id", "fuse_scales", "scaleWH", "had_left", "had_right", "tlut", "rcp")
_EXL3 = ("trellis", "suh", "svh", "mcg", "mul1", "signs")
KINDS = frozenset((*_NATIVE, *_FOREIGN, "tp_rank", *_EXL3))
# Ends of the names of classes whose output embeddings were trained with the model.
_GENERATES = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")


def check_complete(model: nn.Module, names: Mapping[str, TensorInfo], made: Collection[str] = ()) -> None:
    """Check that the files and the model have the same tensors, as far as quantizers and weights are concerned.

    A new head is allowed: weights outside of the base model may be missing if the checkpoint was saved from another class.

    Args:
        model: with its quantized modules in their places; on the meta device or not.
        names: every tensor of the files that is loaded under its own name, by its name in the model.
        made: names of tensors in the model that are made from other tensors in the files (of a foreign checkpoint).

    Raises:
        ValueError: with all that is wrong, the first few by name.
    """
    problems = [f"{key} belongs to no module of {type(model).__name__}" for key in untaken(model, names, made)]
    problems += [f"{key} is there, and is also made of other tensors" for key in sorted(set(made) & names.keys())]
    problems += [f"{key} is missing" for key in not_given(model, {*names, *made})]
    problems += [f"{key} has the type {names[key].dtype} instead of a floating one" for key in integers(model, names)]
    _refuse(problems)


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ValueError(
            f"The quantized checkpoint does not fit the model: {'; '.join(problems[:4])}"
            f"{f'; and {len(problems) - 4} more' if len(problems) > 4 else ''}: {DAMAGED}."
        )


def check_shapes(model: nn.Module, names: Mapping[str, TensorInfo]) -> None:
    """Check that every tensor has the shape that the model has: Transformers says at the end of loading that one has not.

    Args:
        model, names: see [`check_complete`].

    Raises:
        ValueError: with the first few of those that have not.
    """
    state = {key: list(value.shape) for key, value in model.state_dict(keep_vars=True).items()}
    problems = [
        f"{key} has shape {list(info.shape)} instead of {state[key]}"
        for key, info in names.items()
        if key in state and info.as_it_is and list(info.shape) != state[key]
    ]
    _refuse(problems)


def integers(model: nn.Module, names: Mapping[str, TensorInfo]) -> list[str]:
    """Tensors of integers in the files that the model reads as floating-point numbers: their bytes mean something else.

    Args:
        model, names: see [`check_complete`].
    """
    floating = {key for key, value in model.state_dict(keep_vars=True).items() if value.is_floating_point()}
    return [key for key, info in names.items() if key in floating and info.dtype.startswith(("I", "U", "BOOL"))]


def check_types(headers: Mapping[str, TensorInfo]) -> None:
    """Refuse scales of which some are float16 and some bfloat16: two types of one size, which a damaged header confuses.

    Every package of this line writes all tensors of one kind in one of the two.

    Args:
        headers: shape and type of each tensor, by any of its names.

    Raises:
        ValueError: it names one of those that are fewer.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for name, info in headers.items():
        kind = name.rpartition(".")[2]
        if kind in KINDS and info.dtype in ("F16", "BF16"):
            found.setdefault(kind, {}).setdefault(info.dtype, []).append(name)
    for types in found.values():
        if len(types) == 2:
            (rare, names), (common, others) = sorted(types.items(), key=lambda item: len(item[1]))
            raise ValueError(f"{names[0]} has type {rare}, and {len(others)} such tensors have type {common}: {DAMAGED}")


def untaken(model: nn.Module, names: Collection[str], made: Collection[str] = ()) -> list[str]:
    """Tensors of a quantizer in the files that no module of the model takes.

    Args:
        model, names, made: see [`check_complete`].
    """
    state = model.state_dict().keys()
    modules = quantized_modules(model)
    quantized = modules.keys() | {name.rpartition(".")[0] for name in made}
    kinds = KINDS | {key for module in modules.values() for key, _ in module.named_parameters()} - {"bias"}
    result = []
    for name in names:
        module, _, kind = name.rpartition(".")
        if name in state or not (kind in kinds or module in quantized):
            continue
        whole = any(f"{module}.{marker}" in names for marker in MARKERS)
        if not (whole and is_outside(model, name)):
            result.append(name)
    return result


def not_given(model: nn.Module, names: Collection[str]) -> list[str]:
    """Weights of the model that the files do not have, and that must come from there.

    A buffer counts only if the files have the same buffer of another layer: old files from before it was stored are valid.

    Args:
        model: see [`check_complete`].
        names: of all tensors that are given, by their names in the model.
    """
    names = set(names)
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    ignored = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()]
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    alike = {_without_numbers(name) for name in names}
    result = []
    for name in model.state_dict(keep_vars=True):
        if name in names or any(pattern.search(name) for pattern in ignored):
            continue
        if name not in parameters and _without_numbers(name) not in alike:
            continue
        if _is_tied_to_one_of(name, tied, names) or _is_new(model, name):
            continue
        result.append(name)
    return result


def is_outside(model: nn.Module, name: str) -> bool:
    """Whether a tensor belongs to a part that this model does not have: the head of a base model, a modality, …"""
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    if any(re.search(pattern, name) for pattern in ignored):
        return True
    first = name.partition(".")[0]
    base = getattr(model, getattr(model, "base_model_prefix", ""), None)
    known = {key for module in (model, base) if isinstance(module, nn.Module) for key, _ in module.named_children()}
    return first not in known and first != getattr(model, "base_model_prefix", "")


def _is_tied_to_one_of(name: str, tied: Mapping[str, str], names: Collection[str]) -> bool:
    """Whether this weight is tied to another one that the files have."""
    group = {name, tied.get(name, name)}
    group |= {target for target, source in tied.items() if source in group}
    return bool(group & set(names))


def _is_new(model: Any, name: str) -> bool:
    """Whether a weight belongs to a head that this class has and the checkpoint's class does not have."""
    saved = _architectures(getattr(model, "config", None))
    base = getattr(model, "base_model_prefix", "")
    if not saved or type(model).__name__ in saved or not isinstance(getattr(model, base, None), nn.Module):
        return False
    if name.startswith(f"{base}."):
        return False
    ask: Any = getattr(model, "get_output_embeddings", None)
    head = None if ask is None else ask()
    if head is not None and model.get_submodule(name.rpartition(".")[0]) is head:
        return not any(architecture.endswith(_GENERATES) for architecture in saved)
    return True


def _architectures(config: Any) -> list[str]:
    """Names of the classes that the checkpoint was saved from, as its config.json has them."""
    names = getattr(config, "architectures", None)
    return [name for name in names if isinstance(name, str)] if isinstance(names, Iterable) else []


def _without_numbers(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
