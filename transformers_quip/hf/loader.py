"""Facts about Transformers' loader of weights: how it renames tensors, and how it treats errors."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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


def names_in_model(model: PreTrainedModel, headers: Mapping[str, Any], conversions: list) -> dict[str, Any]:
    """The same tensors under the names that they will have in the model, as Transformers' loader renames them.

    Args:
        model: that is going to be loaded.
        headers: by their names in the files.
        conversions: Transformers' `WeightRenaming`s and `WeightConverter`s for this model. A tensor that a converter
            makes several of appears under each name (with the shape that it has in the file).
    """
    conversions = copy.deepcopy(list(conversions))  # renaming a key marks the rules as used
    renamings = [rule for rule in conversions if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in conversions if isinstance(rule, WeightConverter)]
    state = model.state_dict()
    result = {}
    for key, info in headers.items():
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if name not in state and key in state:
            name, pattern = key, None
        result[name] = info
        if pattern is not None:
            converter = next(rule for rule in converters if pattern in rule.source_patterns)
            first, *others = converter.target_patterns
            result.update((name.replace(first, other), info) for other in others)
    return result
