"""Loading a checkpoint of another package: its tensors are re-packed one linear at a time, as Transformers reads them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming, rename_source_key

from ..checkpoints.complete import check_complete, check_shapes, check_types
from ..checkpoints.files import Files
from ..checkpoints.finite import check_small_finite
from ..checkpoints.foreign.exl3 import Exl3
from ..checkpoints.foreign.exl3_storage import check_codes
from ..checkpoints.foreign.plan import ForeignPlan, make_plan
from ..checkpoints.foreign.repack import repack
from ..checkpoints.memory import PageReleaser
from .loader import RaisedLater, names_in_model
from .source import may_be_resized

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def plan_for(model: PreTrainedModel, parameters: Mapping[str, Any], files: Files) -> ForeignPlan:
    """The place in this model of every tensor of a foreign checkpoint; see `checkpoints.foreign.make_plan`."""
    rules = copy.deepcopy(get_model_conversion_mapping(model))  # renaming a key marks the rules as used
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    renamed = {rename_source_key(key, renamings, [])[0]: info for key, info in files.headers.items()}
    return make_plan(model, parameters, renamed, files.read, names_in_model(model, files.headers, rules))


def check_plan(model: PreTrainedModel, plan: ForeignPlan, files: Files) -> None:
    """Check that the files of a foreign checkpoint and the model fit together completely.

    Args:
        model: with the empty quantized modules of the plan in their places.

    Raises:
        ValueError: a tensor of a quantizer has no place, or a weight is missing (see `checkpoints.complete`); or a bias or
            the weight of a norm is not finite.
    """
    check_types(files.headers)
    used = {info.key for linear in plan.linears for info in linear.source.tensors.values()}
    rest = {key: info for key, info in files.headers.items() if key not in used}
    made = []
    for linear in plan.linears:
        module = None if linear.dense else model.get_submodule(linear.name)
        made += [linear.first] if module is None else [f"{linear.name}.{key}" for key, _ in module.named_parameters()]
    names = names_in_model(model, rest, get_model_conversion_mapping(model), whole=True)
    check_complete(model, names, made)
    if not may_be_resized():
        check_shapes(model, names)
    check_small_finite(model, names, files.read)
    if any(isinstance(linear.family, Exl3) for linear in plan.linears):
        check_codes(files.headers)


class Repack(ConversionOps):
    """Re-packs the tensors of one linear as soon as the loader has read them."""

    supports_many_to_many = True

    def __init__(self, plan: ForeignPlan, releaser: PageReleaser):
        self.by_target = {linear.first: linear for linear in plan.linears}
        self.releaser = releaser

    def __deepcopy__(self, memo: dict) -> Repack:
        return self  # the loader copies a converter for every linear

    def convert(
        self,
        input_dict: dict[str, Any],
        full_layer_name: str,
        model: PreTrainedModel,
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


class RepackingConverter(WeightConverter):
    """Collects the tensors of each quantized linear, by exact names, and has them re-packed."""

    def __init__(self, plan: ForeignPlan, releaser: PageReleaser):
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
        """No: the model is saved in the native format, so nothing is to be reversed."""
        return False
