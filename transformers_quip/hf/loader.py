"""Facts about Transformers' loader of weights: how it renames tensors, and how it treats errors."""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, NoReturn

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming, rename_source_key

from ..checkpoints.headers import DAMAGED, TensorInfo
from ..nn.replace import quantized_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class RaisedLater(dict):
    """Replaces tensors, so that the loader itself raises the error as soon as it asks for them.

    The loader catches the errors of an op, goes on with all other weights (hours, for a large model), and at the end raises
    an error without the reason.
    """

    def __init__(self, error: Exception):
        super().__init__()
        self.error = error

    def items(self) -> NoReturn:  # it raises
        raise self.error


def names_in_model(
    model: PreTrainedModel, headers: Mapping[str, TensorInfo], conversions: list, whole: bool = False
) -> dict[str, TensorInfo]:
    """The same tensors under the names that they will have in the model, as Transformers' loader renames them.

    Args:
        model: the model to load.
        headers: by their names in the files.
        conversions: Transformers' `WeightRenaming`s and `WeightConverter`s for this model. A tensor that a converter
            splits appears under each name (with the shape that it has in the file, and not `as_it_is`).
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
        if pattern is not None:
            info = replace(info, as_it_is=False)
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


def names_in_source(model: PreTrainedModel) -> Callable[[str], str]:
    """The function from a tensor's name in the model to its name in checkpoints of the architecture's makers.

    Other packages go by the latter. The function raises `ValueError` for a name that Transformers would not read back.
    """
    rules = get_model_conversion_mapping(model, add_legacy=False)
    rules = [rule for rule in rules if isinstance(rule, WeightRenaming) and not isinstance(rule, PrefixChange)]
    back = [rule.reverse_transform() for rule in copy.deepcopy(rules)[::-1]]

    def name_in_source(name: str) -> str:
        source = rename_source_key(name, back, [])[0]
        if rename_source_key(source, rules, [])[0] != name:
            raise ValueError(f"{name} has another name in checkpoints of {type(model).__name__}, which is not known")
        return source

    return name_in_source


def names_that_would_change(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """The tensors of quantized modules that Transformers would join to others, or write under a name that becomes another.

    Args:
        model: with its quantized modules.
        names: of all tensors to write.
    """
    rules = getattr(model, "_weight_conversions", None)
    if rules is None:
        rules = get_model_conversion_mapping(model, add_legacy=False)
    rules = copy.deepcopy(list(rules))  # renaming a key marks the rules as used
    back = [rule.reverse_transform() for rule in copy.deepcopy(rules)[::-1]]
    forward, backward = _by_kind(rules), _by_kind(back)
    quantized = quantized_modules(model)
    state = model.state_dict(keep_vars=True)
    kept = []
    for name in names:
        if not any(module in quantized for module in _parents(name)):
            continue
        if rename_source_key(name, [], backward[1])[1] is not None:
            kept.append(name)
            continue
        source = rename_source_key(name, backward[0], [])[0]
        if source != name and rename_source_key(source, *forward, model.base_model_prefix, state)[0] != name:
            kept.append(name)
    return kept


def _by_kind(rules: list) -> tuple[list, list]:
    """Those that rename, and those that convert."""
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    return renamings, [rule for rule in rules if isinstance(rule, WeightConverter)]


def _parents(name: str) -> Iterator[str]:
    """The names of the modules that a tensor may belong to."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _check_stack(keys: list[str], count: int) -> None:
    """Raise `ValueError` unless each expert, from 0 on, has a tensor: Transformers stacks those that it finds."""
    numbers = {int(found[-1]): key for key in keys if (found := re.findall(r"(?<=\.)\d+(?=\.)", key))}
    lost = next((number for number in range(count) if number not in numbers), None)  # the count may be a hostile one
    if lost is not None and numbers:
        number, key = next(iter(numbers.items()))
        head, _, tail = key.rpartition(f".{number}.")
        raise ValueError(f"The checkpoint has no {head}.{lost}.{tail}, one of {count} that the model stacks: {DAMAGED}")
