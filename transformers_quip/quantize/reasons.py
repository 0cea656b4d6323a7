"""The reasons for which weights of a model stay dense."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..calibration.blocks import find_block_lists
from ..calibration.reads import kind_of, read_by_others
from ..config.patterns import is_called, is_named
from ..nn.replace import LINEARS, linear_shape
from ..nn.stacks import Stack

if TYPE_CHECKING:
    from ..config import QuipConfig

OUTPUT_EMBEDDINGS = "output embeddings"
TIED = "tied to another weight"
SHARED = "one module used in several places"
NOT_CONVERTED = "in modules_to_not_convert"
FLOAT32 = "kept in float32 by the model"
OUTSIDE_BLOCKS = "outside the decoder blocks"
TASK_HEAD = "a head outside the base model"
STACKED = "a stack of matrices of a form that is not known"
EMBEDDING = "embedding"
VECTORS = "norms, biases and other vectors"
READ = "its weight is read by the model itself"
ROUTER = "a router, or a gate of one output"
EMPTY = "it has no numbers"
# Parts of the names of modules that choose experts: anywhere, and next to experts.
_ROUTER = re.compile(r"(?:.*_)?router")
_GATE = re.compile(r"(?:.*_)?(?:gate|gating|wg|classifier)")


def linear_reasons(
    model: nn.Module, linears: dict[str, nn.Module], stacks: Iterable[str], config: QuipConfig
) -> dict[str, str]:
    """The reason for each linear that stays dense.

    Args:
        model: dense, on the meta device or not.
        linears: its linears by name.
        stacks: the names of its stacks of experts.
        config: the options.

    Raises:
        ValueError: the options name an output embedding that is tied.
    """
    find_output: Any = getattr(model, "get_output_embeddings", None)
    output = None if find_output is None else find_output()
    tied = tied_modules(model)
    places = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    float32 = float32_modules(model)
    blocks = _quantized_parts(model, config) if linears else ("",)
    mixtures = _mixtures(model, stacks)
    read = read_by_others(model)
    base = {id(module) for module in getattr(model, "base_model", model).modules()}
    reasons = {}
    for name, module in linears.items():
        if module is output and is_called(name, config.modules or {}):
            if name in tied:
                raise tied_error(name)
        elif module is output:
            reasons[name] = f"{OUTPUT_EMBEDDINGS}, {TIED}" if name in tied else OUTPUT_EMBEDDINGS
        elif 0 in linear_shape(module):
            reasons[name] = EMPTY
        elif places[id(module)] > 1:
            reasons[name] = SHARED
        elif name in tied:
            reasons[name] = TIED
        elif is_named(name, config.modules_to_not_convert or []):
            reasons[name] = NOT_CONVERTED
        elif is_named(name, float32):
            reasons[name] = FLOAT32
        elif not name.startswith(blocks):
            reasons[name] = OUTSIDE_BLOCKS
        elif kind_of(name) in read:
            reasons[name] = READ
        elif id(module) not in base and not is_called(name, config.modules or {}):
            reasons[name] = TASK_HEAD
        elif _is_router(name, linear_shape(module)[0], mixtures) and not is_called(name, config.modules or {}):
            reasons[name] = ROUTER
    return reasons


def stack_reasons(model: nn.Module, stacks: dict[str, Stack], config: QuipConfig) -> dict[str, str]:
    """The reason for each stack of experts that stays dense: of one module, all are quantized or none."""
    blocks = _quantized_parts(model, config) if stacks else ("",)
    places = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    float32, dense, reasons = float32_modules(model), config.modules_to_not_convert or [], {}
    for name in stacks:
        module = name.rpartition(".")[0]
        if places[id(model.get_submodule(module))] > 1:
            reasons[module] = SHARED
        elif any(is_named(given, dense) for given in (module, name)):
            reasons[module] = NOT_CONVERTED
        elif any(is_named(given, float32) for given in (module, name)):
            reasons[module] = FLOAT32
        elif not name.startswith(blocks):
            reasons[module] = OUTSIDE_BLOCKS
    return {name: reasons[module] for name in stacks if (module := name.rpartition(".")[0]) in reasons}


def _quantized_parts(model: nn.Module, config: QuipConfig) -> tuple[str, ...]:
    """The beginnings of the names of everything that is quantized."""
    if not config.is_calibrated:
        return ("",)
    blocks = tuple(f"{name}." for name in find_block_lists(model))  # raises if there are none to calibrate
    return blocks if config.outside_blocks == "dense" else ("",)


def _mixtures(model: nn.Module, stacks: Iterable[str]) -> set[str]:
    """The modules around experts, in which routers are, with a dot."""
    inside = {name.rpartition(".")[0] for name in stacks}  # the modules that have the stacks
    inside |= {name for name, _ in model.named_modules() if name.rpartition(".")[2] == "experts"}
    return {name.rpartition(".")[0] + "." for name in inside if "." in name}


def _is_router(name: str, rows: int, mixtures: Iterable[str]) -> bool:
    """Whether a linear chooses experts, by its place and its name, or is a gate: one output."""
    if rows == 1 or any(map(_ROUTER.fullmatch, name.split("."))):
        return True
    rest = [name.removeprefix(mixture).split(".") for mixture in mixtures if name.startswith(mixture)]
    return any(_GATE.fullmatch(part) for parts in rest for part in parts)


def tied_error(name: str) -> ValueError:
    """The error for tied embeddings that the options name."""
    return ValueError(
        f"modules names {name!r}, but its weight is {TIED}: untie the model's embeddings and save it first "
        "(config.tie_word_embeddings=False), or leave it dense"
    )


def float32_modules(model: nn.Module) -> list[str]:
    """The modules that the model keeps in float32 while the others have fewer bits."""
    if getattr(model, "dtype", None) == torch.float32:
        return []
    kept = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    return [name for attribute in kept for name in getattr(model, attribute, None) or ()]


def tied_modules(model: nn.Module) -> set[str]:
    """Modules that share their weight with another module: by Transformers' table (on the meta device), or by identity."""
    keys = getattr(model, "all_tied_weights_keys", None) or {}
    tied = {name.rpartition(".")[0] for name in (*keys.keys(), *keys.values())}
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name.rpartition(".")[0])
    for names in owners.values():
        if len(set(names)) > 1:
            tied.update(names)
    return tied


def why_no_linear(owner: nn.Module, parameter: nn.Parameter) -> str:
    """The reason why a parameter is not the weight of a linear."""
    if parameter.ndim < 2:
        return VECTORS
    if isinstance(owner, nn.Embedding):
        return EMBEDDING
    if parameter.ndim == 3 and type(owner).__module__.partition(".")[0] != "torch":
        return STACKED
    if isinstance(owner, LINEARS):
        return f"{type(owner).__name__} is a subclass of nn.Linear or Conv1D that computes something else"
    return f"a weight of {type(owner).__name__}, which is neither nn.Linear nor Conv1D"
