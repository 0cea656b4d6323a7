"""Plan the loading of a checkpoint of another package: its family, and the place of each of its tensors in the model.

Nothing here reads a large tensor. The result is a [`ForeignPlan`]: the native config, and for every quantized linear the
tensors that it is made of and a pure function that re-packs them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ...config import QuipConfig
from ...config.storage import Storage
from ...nn.place import fused_shape, possible_names
from ...nn.replace import is_dense_embedding, is_dense_linear, linear_shape
from ...nn.unstacked import can_unstack, expert_shape
from ..complete import is_outside
from ..headers import DAMAGED, TensorInfo
from .exl3 import Exl3
from .family import Family, Form, Source, is_one_of
from .native_config import native_config
from .qtip import Qtip
from .quip_for_all import QuipForAll
from .quip_sharp import QuipSharp
from .repack import ForeignLinear

logger = logging.getLogger(__name__)

# The quant_method of foreign configs, by family. A config with "quip_params" does not have one.
METHODS: dict[str, Family] = {"QUiP": QuipForAll(), "exl3": Exl3()}
# Linears that checkpoints split where Transformers' module is one: name there → (name here, all that it is made of).
_PARTS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), ("qkv_proj", ("q_proj", "k_proj", "v_proj"))),
    **dict.fromkeys(("gate_proj", "up_proj"), ("gate_up_proj", ("gate_proj", "up_proj"))),
}


def family_of(parameters: Mapping[str, Any]) -> Family:
    """The family of a checkpoint.

    Args:
        parameters: its quantization_config, or its "quip_params".

    Raises:
        ValueError: it is not known, or of a kind that is not supported.
    """
    method = parameters.get("quant_method")
    if method is None:
        family: Family = Qtip() if "decode_mode" in parameters or "td_x" in parameters else QuipSharp()
    elif is_one_of(method, METHODS):
        family = METHODS[method]
    else:
        raise ValueError(f"quant_method={method!r} is not one of {', '.join(map(repr, METHODS))}")
    family.check(parameters)
    return family


@dataclass(frozen=True)
class ForeignPlan:
    """How a foreign checkpoint becomes a native one.

    Attributes:
        linears: every quantized linear.
        config: the native config.
    """

    linears: tuple[ForeignLinear, ...]
    config: QuipConfig


def make_plan(
    model: nn.Module,
    parameters: Mapping[str, Any],
    headers: Mapping[str, TensorInfo],
    read: Callable[[TensorInfo], torch.Tensor],
    names: Mapping[str, TensorInfo],
) -> ForeignPlan:
    """Find a place in the model for every quantized linear of a checkpoint.

    Args:
        model: dense, as Transformers builds it; on the meta device or not.
        parameters: the checkpoint's description of itself.
        headers: its tensors by the names that Transformers' renamings give them.
        read: reads one tensor.
        names: all tensors that the checkpoint has, by their names in the model.

    Raises:
        ValueError: the checkpoint is of a kind that is not supported, contradicts itself or does not fit the model.
    """
    family = family_of(parameters)
    sources = _collect(family, headers, read)
    if not sources:
        raise ValueError(
            f"The config says that this is a checkpoint of {family.name}, but no tensor is called …{family.marker}: "
            f"{DAMAGED}"
        )
    _check_folded(model, family, headers)
    linears, joined = [], {}
    for source in sources:
        if is_outside(model, source.name):
            logger.warning("%s of the checkpoint is not a part of %s and is left out", source.name, type(model).__name__)
            continue
        place = _find_place(model, family, source)
        describe = family.describe_table if place.table else family.describe
        form = describe(source, place.rows, place.columns, parameters)
        _check_bias(source, place, form)
        factor = family.folded_factor(model.config, source.name)
        if factor != 1:
            form = replace(form, details={**form.details, "folded": factor})
        if place.fuses:
            storage = replace(form.storage, fuses=place.fuses)
            form = replace(form, storage=storage, details={**form.details, "parts": place.counts})
        if place.parts:
            parts = tuple(place.parts.items())
            joined[place.name.rpartition(".")[0]] = Storage(scales_dtype=form.storage.scales_dtype, parts=parts)
        linears.append(ForeignLinear(place.name, family, form, source, place.dense, place.table))
    _check_complete(model, linears, names)
    packed = [linear for linear in linears if not linear.dense]
    if not packed:
        raise ValueError(
            f"{type(model).__name__} has none of the quantized linears of the checkpoint (the first is "
            f"{sources[0].name}): is this another architecture?"
        )
    return ForeignPlan(tuple(linears), native_config(packed, joined))


def _collect(family: Family, headers: Mapping[str, TensorInfo], read: Callable[[TensorInfo], torch.Tensor]) -> list[Source]:
    sources = []
    suffix = "." + family.marker
    for key in headers:
        if not key.endswith(suffix):
            continue
        name = key.removesuffix(suffix)
        keys = {kind: f"{name}.{kind}" for kind in (*family.kinds, "bias")} | family.siblings(name)
        keys = {kind: key for kind, key in keys.items() if key in headers}
        tensors = {kind: headers[key] for kind, key in keys.items()}
        sources.append(Source(name, tensors, keys, partial(_read, read, tensors)))
    return sources


def _read(read: Callable[[TensorInfo], torch.Tensor], tensors: Mapping[str, TensorInfo], kind: str) -> torch.Tensor:
    return read(tensors[kind])


@dataclass(frozen=True)
class _Place:
    name: str
    rows: int
    columns: int
    fuses: tuple[str, ...] = ()
    counts: tuple[int, ...] = ()
    parts: Mapping[str, int] | None = None
    dense: bool = False
    bias: bool = False
    table: bool = False  # of an embedding


def _find_place(model: nn.Module, family: Family, source: Source) -> _Place:
    """Where a linear or embedding of a checkpoint belongs. Raises `ValueError` if the model has no such place."""
    name = source.name
    for here in possible_names(model, name):
        parent_name, _, last = here.rpartition(".")
        module, parent = _module(model, here), _module(model, parent_name)
        if module is not None and is_dense_linear(module):
            return _Place(here, *linear_shape(module), bias=module.bias is not None)
        if isinstance(module, nn.Embedding) and family.is_table(source):
            # a subclass, such as Gemma's, does more than looking rows up, and gets a dense table
            return _Place(here, *linear_shape(module), dense=not is_dense_embedding(module), table=True)
        if parent is None:
            expert = re.fullmatch(r"(.+)\.\d+\.([^.]+)", here)
            stacked = _module(model, expert[1]) if expert else None
            if expert and stacked is not None and can_unstack(stacked):
                shape = expert_shape(stacked, expert[2])
                if shape is not None:
                    return _Place(here, *shape)
            continue
        if module is None and last in family.fused:
            fuses = family.fused[last]
            counts, columns = fused_shape(parent, fuses, here)
            return _Place(here, sum(counts), columns, fuses, tuple(counts))
        whole, names = _PARTS.get(last, ("", ()))
        linear = _module(parent, whole) if whole else None
        if module is None and linear is not None and is_dense_linear(linear):
            rows, columns = linear_shape(linear)
            parts = dict(zip(names, _split(model, rows, len(names)), strict=True))
            bias = linear.bias is not None
            return _Place(f"{parent_name}.{whole}.{last}", parts[last], columns, parts=parts, bias=bias)
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.ndim == 2 and not isinstance(module, nn.Embedding):
            rows, columns = weight.shape
            return _Place(here, rows, columns, dense=True)
    for kind, pattern in family.refused.items():
        if re.search(pattern, name):
            raise ValueError(f"The checkpoint has {name}: {kind} of {family.name} are not supported")
    raise ValueError(
        f"The checkpoint has a quantized linear {name}, but {type(model).__name__} has none of that name: the files belong "
        "to another architecture than config.json says, or Transformers has changed it"
    )


def _module(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _split(model: Any, rows: int, count: int) -> list[int]:
    """Output sizes of the parts of a fused linear: a half each for gate and up; by the numbers of heads for q, k and v."""
    if count == 2:
        return [rows // 2] * 2
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    size = rows // (heads + 2 * groups)
    return [heads * size, groups * size, groups * size]


def _check_folded(model: nn.Module, family: Family, headers: Mapping[str, TensorInfo]) -> None:
    """Refuse a dense weight where the package folds a factor into quantized ones: whether it is in this one is unknown."""
    for key in headers:
        name = key.removesuffix(".weight")
        if name != key and family.folded_factor(model.config, name) != 1:
            raise ValueError(
                f"{key} is not quantized, and {family.name} files of {type(model).__name__} have a factor in the "
                "quantized weights of that name; whether this one has it cannot be known, so it is not loaded"
            )


def _check_bias(source: Source, place: _Place, form: Form) -> None:
    """A bias where the model has one, of its size (or the padded one), and nowhere else."""
    if place.bias and "bias" not in source.tensors:
        raise ValueError(f"{source.name}.bias is missing: {DAMAGED}")
    if not place.bias and "bias" in source.tensors:
        raise ValueError(f"{source.name}.bias exists, but that linear of the model has none: {DAMAGED}")
    shape = source.shape("bias")
    if shape is not None and shape not in ((place.rows,), (form.padded[0],)):
        raise ValueError(f"{source.name}.bias has shape {list(shape)} instead of [{place.rows}]: {DAMAGED}")


def _check_complete(model: nn.Module, linears: Iterable[ForeignLinear], names: Mapping[str, TensorInfo]) -> None:
    """Every linear of the model must be in the checkpoint: Transformers gives one that is missing random weights."""
    linears = list(linears)
    there = {linear.name for linear in linears}
    for linear in linears:
        parent = linear.name.rpartition(".")[0]
        there.update(f"{parent}.{name}" for name in linear.form.storage.fuses)
        there.update((parent, parent.rpartition(".")[0]))  # the linear that it is a part of, or the experts
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    for name, module in model.named_modules():
        weight = f"{name}.gate_up_proj" if can_unstack(module) else f"{name}.weight"
        if not (is_dense_linear(module) or can_unstack(module)) or name in there or weight in tied:
            continue
        if weight not in names or names[weight].shape == ():  # a single number next to codes tells their type
            raise ValueError(f"The checkpoint has neither codes nor a weight for {name}: {DAMAGED}")
