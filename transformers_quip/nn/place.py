"""Put empty quantized linears where a config has some: also fused ones, parts of one, and experts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from .embedding import QuipEmbedding
from .empty import empty_linear
from .fused import FusedRows, Fusion, JoinedLinear
from .linear import QuipLinear
from .replace import (
    DenseLinear,
    empty_embedding,
    empty_like,
    is_dense_embedding,
    is_dense_linear,
    linear_shape,
    replace_experts,
)
from .stacks import find_stacks
from .unstacked import UnstackedExperts, can_unstack, expert_shape


def place_all(model: nn.Module, recorded: Iterable[str], config: Any) -> None:
    """Put empty quantized modules, on the meta device, where the dense ones are.

    Names that the model does not have are skipped.

    Args:
        model: on the meta device or not.
        recorded: names of the quantized linears and embeddings as config.json has them; see [`possible_names`].
        config: has `for_module` and `storage_of` (`QuipConfig`).

    Raises:
        ValueError: a record of config.json does not fit the model.
    """
    modules = dict(model.named_modules())
    joined: dict[str, dict[str, str]] = defaultdict(dict)
    experts: dict[str, dict[str, str]] = defaultdict(dict)
    stacks: dict[str, dict[str, str]] = defaultdict(dict)
    for name in recorded:
        for here in possible_names(model, name):
            parent, _, last = here.rpartition(".")
            grandparent = parent.rpartition(".")[0]
            # a number is not the name of a fused linear, so a name that is in no model is not checked further
            if parent in modules and not last.isdecimal() and config.storage_of(name).fuses:
                _fuse(model, here, config, name)
            elif here in modules and is_dense_linear(modules[here]):
                model.set_submodule(here, empty_like(modules[here], config, name))
            elif here in modules and is_dense_embedding(modules[here]):
                model.set_submodule(here, empty_embedding(modules[here], config, name))
            elif parent in modules and is_dense_linear(modules[parent]):
                joined[parent][last] = name
            elif parent in modules and last in find_stacks(modules[parent]):
                stacks[parent][last] = name
            elif grandparent in modules and can_unstack(modules[grandparent]):
                experts[grandparent][f"{parent.rpartition('.')[2]}.{last}"] = name
            else:
                continue
            break
    for here, names in joined.items():
        _join(model, here, names, config)
    for here, names in experts.items():
        _spread(model, here, names, config)
    for here, names in stacks.items():
        _stack(model, here, names, config)
    _untie(model)


@torch.no_grad()
def restore_structure(model: nn.Module) -> None:
    """After the quantized linears have become dense (`replace.replace_by_dense`): the model's own modules again."""
    for name, module in list(model.named_modules()):
        if isinstance(module, JoinedLinear):
            model.set_submodule(name, _dense([*module.parts()]))
        elif isinstance(module, UnstackedExperts):
            weights = {key.removesuffix(".weight"): value for key, value in module.state_dict().items()}
            model.set_submodule(name, module.stack(weights))
        fused = set()
        for key, part in list(module.named_children()):
            if isinstance(part, FusedRows):
                whole = getattr(module, part.fusion.name)
                setattr(module, key, _dense([whole], part.begin, part.end))
                fused.add(part.fusion.name)
        for key in fused:
            delattr(module, key)


def _dense(linears: list[nn.Linear], begin: int = 0, end: int | None = None) -> nn.Linear:
    """One dense linear of some outputs of several that have the same input."""
    with torch.device("meta"):
        result = nn.Linear(1, 1, bias=linears[0].bias is not None)
    result.weight = nn.Parameter(torch.cat([linear.weight for linear in linears])[begin:end].clone())
    if result.bias is not None:
        result.bias = nn.Parameter(torch.cat([linear.bias for linear in linears])[begin:end].clone())
    result.out_features, result.in_features = result.weight.shape
    return result.train(linears[0].training)


def _untie(model: nn.Module) -> None:
    """A quantized head, or a quantized table, has no weight to share with the other, whatever config.json says."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    modules = dict(model.named_modules())
    kinds = (QuipLinear, QuipEmbedding)
    for name in [k for k, v in tied.items() if any(isinstance(modules.get(n.rpartition(".")[0]), kinds) for n in (k, v))]:
        del tied[name]
        config: Any = model.config  # of Transformers
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False


def possible_names(model: nn.Module, name: str) -> tuple[str, ...]:
    """The names that a module of a checkpoint may have in this model, the likeliest first.

    A model with a head may be loaded from a checkpoint of its base model alone, or the other way round: the base model's
    prefix may be missing or too many.
    """
    prefix = getattr(model, "base_model_prefix", "") + "."
    return tuple(dict.fromkeys((name, prefix + name, name.removeprefix(prefix))))


def fused_shape(parent: nn.Module, names: Iterable[str], fused: str) -> tuple[list[int], int]:
    """Outputs of each of the linears of a module that are stored as one called `fused`, and their common inputs.

    Raises:
        ValueError: they cannot be.
    """
    shapes = []
    for name in names:
        linear = getattr(parent, name, None)
        if linear is None or not is_dense_linear(linear) or linear.bias is not None:
            fault = "has a bias" if getattr(linear, "bias", None) is not None else "is not a dense linear of this model"
            raise ValueError(f"{fused} fuses {', '.join(names)}, but {name} {fault}")
        shapes.append(linear_shape(linear))
    if len({columns for _, columns in shapes}) != 1:
        raise ValueError(f"{fused} fuses {', '.join(names)}, which have different inputs: {shapes}")
    return [rows for rows, _ in shapes], shapes[0][1]


def _fuse(model: nn.Module, here: str, config: Any, name: str) -> None:
    path, _, last = here.rpartition(".")
    parent, names = model.get_submodule(path), config.storage_of(name).fuses
    rows, columns = fused_shape(parent, names, here)
    first = getattr(parent, names[0])
    fused = empty_linear(sum(rows), columns, config, name, bias=False, dtype=first.weight.dtype)
    parent.add_module(last, fused.train(first.training))
    fusion, begin = Fusion(parent, last, len(names)), 0
    for part, count in zip(names, rows, strict=True):
        setattr(parent, part, FusedRows(fusion, begin, begin + count).train(first.training))
        begin += count


def _join(model: nn.Module, here: str, names: Mapping[str, str], config: Any) -> None:
    linear: DenseLinear = model.get_submodule(here)
    prefix = next(iter(names.values())).rpartition(".")[0]
    parts = dict(config.storage_of(prefix).parts)
    rows, columns = linear_shape(linear)
    if set(parts) != set(names) or sum(parts.values()) != rows:
        raise ValueError(
            f"{here} has {rows} outputs; config.json has {parts} as its parts and lists {sorted(names)} as quantized: "
            "these must be the same parts, and their outputs together those of the linear"
        )
    biased, dtype = linear.bias is not None, linear.weight.dtype
    linears = {
        key: empty_linear(count, columns, config, names[key], bias=biased, dtype=dtype) for key, count in parts.items()
    }
    model.set_submodule(here, JoinedLinear(linears).train(linear.training))


def _spread(model: nn.Module, here: str, names: Mapping[str, str], config: Any) -> None:
    stacked: Any = model.get_submodule(here)  # of Transformers
    roles = sorted({key.partition(".")[2] for key in names})
    count = stacked.down_proj.shape[0]
    wanted = (f"{index}.{role}" for index in range(count) for role in roles)  # not a set: the count may be a hostile one
    missing = next((key for key in wanted if key not in names), None)
    shapes = {role: shape for role in roles if (shape := expert_shape(stacked, role)) is not None}
    if missing is not None or len(names) != 3 * count or len(roles) != 3 or len(shapes) != 3:
        raise ValueError(
            f"{here} has {count} experts, of which only some linears are quantized (not {missing or roles[0]}): "
            "all or none can be"
        )
    dtype = stacked.down_proj.dtype
    experts = [
        {role: empty_linear(*shapes[role], config, names[f"{index}.{role}"], bias=False, dtype=dtype) for role in roles}
        for index in range(count)
    ]
    model.set_submodule(here, UnstackedExperts(stacked, experts).train(stacked.training))


def _stack(model: nn.Module, here: str, names: Mapping[str, str], config: Any) -> None:
    missing = find_stacks(model.get_submodule(here)).keys() - names.keys()
    if missing:
        raise ValueError(
            f"{here}: config.json lists {', '.join(sorted(names))} of its experts as quantized, and not "
            f"{', '.join(sorted(missing))}: all or none can be"
        )
    replace_experts(model, here, config)
