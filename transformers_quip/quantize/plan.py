"""The plan: which modules are quantized, and why others are not. It needs only names and shapes, before any work."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from .. import codebooks, incoherence, rounding
from ..config.patterns import is_called, is_named, matches
from ..nn.experts import QuipExperts, stacked_grids
from ..nn.linear import QuipLinear
from ..nn.replace import dense_stacks, is_dense_embedding, is_dense_linear, linear_shape
from ..nn.stacks import Stack
from .reasons import (
    EMBEDDING,
    NOT_CONVERTED,
    OUTPUT_EMBEDDINGS,
    OUTSIDE_BLOCKS,
    VECTORS,
    linear_reasons,
    stack_reasons,
    tied_error,
    tied_modules,
    why_no_linear,
)

if TYPE_CHECKING:
    from ..config import QuipConfig


# A larger share of dense weights than this, outside the embeddings and the head, is worth a warning.
WARNED_SHARE = 0.1


@dataclass(frozen=True)
class PlanEntry:
    """The decision on one module (or on one parameter, if it is neither linear nor quantized).

    Attributes:
        name: of the module or parameter.
        shape: (out_features, in_features) of a linear, (experts, outputs, inputs) of a stack, else the parameter's own.
        parameters: number of entries of the weight.
        linear: whether it is the weight of a dense linear.
        stacked: whether it is the weight of one projection of all experts of a mixture; then `name` is the parameter's.
        quantized: whether it will be quantized.
        reason: why it is not quantized; "" if it is.
        packed_bytes: of the quantized weight: codes, su and sv; 0 if it stays dense.
    """

    name: str
    shape: tuple[int, ...]
    parameters: int
    linear: bool = False
    quantized: bool = False
    reason: str = ""
    packed_bytes: int = 0
    stacked: bool = False

    @property
    def weight(self) -> str:
        """The name of the parameter."""
        return self.name if self.stacked else f"{self.name}.weight"


@dataclass(frozen=True)
class QuantizationPlan:
    """All weights of a model, each with its decision.

    Attributes:
        entries: linears in the order of the model, then experts, embeddings, and everything else that is not quantized.
        codebooks: those that are used.
    """

    entries: tuple[PlanEntry, ...]
    codebooks: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The weights to quantize: linears in the order of the model, then stacks of experts, then embeddings."""
        return tuple(entry.name for entry in self.entries if entry.quantized)

    @property
    def stacks(self) -> tuple[str, ...]:
        """Those of `names` that are stacks of experts."""
        return tuple(entry.name for entry in self.entries if entry.quantized and entry.stacked)

    @property
    def embeddings(self) -> tuple[str, ...]:
        """Those of `names` that are embeddings."""
        return tuple(entry.name for entry in self.entries if entry.quantized and not (entry.stacked or entry.linear))

    def inside(self, prefix: str) -> tuple[str, ...]:
        """The modules to quantize whose name begins with this prefix, without it."""
        return tuple(name.removeprefix(prefix) for name in self.names if name.startswith(prefix))

    @property
    def parameters(self) -> int:
        """Parameters of the whole model, tied ones once."""
        return sum(entry.parameters for entry in self.entries)

    @property
    def share(self) -> float:
        """The share of the model's parameters that is quantized."""
        return sum(entry.parameters for entry in self.entries if entry.quantized) / self.parameters

    @property
    def true_bits(self) -> float:
        """Bits per quantized weight: all bytes of codes, su and sv."""
        quantized = [entry for entry in self.entries if entry.quantized]
        return 8 * sum(entry.packed_bytes for entry in quantized) / sum(entry.parameters for entry in quantized)

    def left_dense(self) -> dict[str, list[PlanEntry]]:
        """The dense entries, by reason."""
        groups: dict[str, list[PlanEntry]] = {}
        for entry in self.entries:
            if not entry.quantized:
                groups.setdefault(entry.reason, []).append(entry)
        return groups

    def coverage_warning(self) -> str:
        """A text for the user if much stays dense besides embeddings, the head and what was left by choice; else ""."""
        counted = [e for e in self.entries if not e.reason.startswith((EMBEDDING, OUTPUT_EMBEDDINGS, NOT_CONVERTED))]
        left: dict[tuple[str, str], int] = {}
        for entry in counted:
            if not entry.quantized:
                kind = (re.sub(r"(?<=\.)\d+(?=\.)", "*", entry.name), entry.reason)
                left[kind] = left.get(kind, 0) + entry.parameters
        total, dense = sum(entry.parameters for entry in counted), sum(left.values())
        if dense <= WARNED_SHARE * total:
            return ""
        most = sorted(left.items(), key=lambda item: -item[1])[:3]
        shown = "; ".join(f"{name}, {size / total:.0%} ({reason})" for (name, reason), size in most)
        outside = any(reason == OUTSIDE_BLOCKS for (_, reason), _ in most)
        remedy = "outside_blocks='uncalibrated', with 8 bits for them" if outside else ""
        return (
            f"{dense / total:.0%} of the weights outside the embeddings and the head stay dense: {shown}. "
            + (f"An option that changes this: {remedy}. " if remedy else "No option changes this. ")
            + "To leave them dense without this warning, name them in modules_to_not_convert"
        )

    def summary(self) -> str:
        """The coverage in a few lines for the user."""
        count = sum(entry.quantized and entry.linear for entry in self.entries)
        more = _counted(len(self.stacks), "stack", " of experts") + _counted(len(self.embeddings), "embedding")
        lines = [
            f"{count} of {sum(entry.linear for entry in self.entries)} linear layers{more}, "
            f"{self.share:.1%} of {_count(self.parameters)} parameters, are quantized to {self.true_bits:.3f} bits per "
            f"weight (codebook {', '.join(self.codebooks)})."
        ]
        for reason, entries in self.left_dense().items():
            share = sum(entry.parameters for entry in entries) / self.parameters
            some = ", ".join(entry.name for entry in entries[:3])
            more = f" and {len(entries) - 3} more" if len(entries) > 3 else ""
            shown = f"{len(entries)} {reason}" if reason == VECTORS else f"{some}{more} ({reason})"
            lines.append(f"  left dense, {share:.1%}: {shown}")
        return "\n".join(lines)


def check_device(device: object) -> None:
    """Refuse to quantize on a device that cannot: one of PyTorch, or its name, or another entry of a device map.

    Raises:
        ValueError: the device is MPS.
    """
    if str(device).partition(":")[0] == "mps":
        raise ValueError(
            f"Models cannot be quantized on {device}: Apple's MPS has no float64, which rounding needs. Quantize on the "
            'CPU (device_map="cpu"), save the model, and load it with device_map="mps"'
        )


def make_plan(model: nn.Module, config: QuipConfig) -> QuantizationPlan:
    """Decide for every weight of the model, on the meta device or not, whether it is quantized.

    A calibrated run quantizes the linears and experts inside the decoder blocks; a run without calibration all. Left out
    are the output embeddings, heads of other tasks (every linear outside the base model), weights that are tied, modules
    that the model keeps in float32 and those that `config.modules_to_not_convert` names: a prefix up to a dot, a suffix,
    or a regular expression, as everywhere in Transformers (there the list replaces the default, here it adds to it).
    Output embeddings, embeddings, and without calibration heads of other tasks, are quantized on request: if a pattern
    of `config.modules` calls them by name ([`is_called`]).

    Raises:
        ValueError: there is nothing to quantize, a size cannot be quantized, a pattern is not a regular expression, or
            embeddings that `config.modules` names are tied, or cannot be quantized in that way.
    """
    if any(isinstance(module, (QuipLinear, QuipExperts)) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} is quantized already: start from the original, dense model")
    patterns = config.modules_to_not_convert or []
    _check_patterns(patterns)
    entries = []
    linears = {name: module for name, module in model.named_modules() if is_dense_linear(module)}
    stacks = dense_stacks(model)
    if not linears and not stacks:
        raise ValueError(f"{type(model).__name__} has no nn.Linear (or Conv1D) layer, so QuIP# cannot quantize it")
    dense = linear_reasons(model, linears, stacks, config)
    for name, module in linears.items():
        shape = linear_shape(module)
        reason = dense.get(name, "")
        size = 0 if reason else _packed_bytes(name, shape, module.weight.dtype, config.for_module(name))
        entries.append(PlanEntry(name, shape, module.weight.numel(), True, not reason, reason, size))
    left = stack_reasons(model, stacks, config)
    for name, stack in stacks.items():
        reason, size = left.get(name, ""), 0
        if not reason:
            size = _check_stack(name, stack, model.get_parameter(name).dtype, config.for_module(name))
        entries.append(PlanEntry(name, stack.shape, stack.weights, False, not reason, reason, size, stacked=True))
    tables = _embeddings(model, config)
    entries += tables
    if all(not entry.quantized for entry in entries):
        others = [e for e in _rest(model, [entry.weight for entry in entries]) if e.reason not in (VECTORS, EMBEDDING)]
        others = sorted(others, key=lambda entry: -entry.parameters)[:2]
        found = "; ".join(f"{entry.name}: {entry.reason}" for entry in (*entries[:2], *others))
        raise ValueError(f"Nothing of {type(model).__name__} would be quantized ({found})")
    entries = _without_repetitions(model, entries)
    entries += _rest(model, [entry.weight for entry in entries])
    configs = (config.for_module(entry.name) for entry in entries if entry.quantized)
    used = {"chosen for each module" if found.is_mixed else str(found.codebook): None for found in configs}
    return QuantizationPlan(tuple(entries), tuple(used))


def unmatched_patterns(model: nn.Module, config: QuipConfig) -> list[str]:
    """The patterns of `modules_to_not_convert` and `modules` that match no module of the model (misspelled?)."""
    names = [*(name for name, _ in model.named_modules()), *dense_stacks(model)]
    left = config.modules_to_not_convert or []
    return [pattern for pattern in left if not any(is_named(name, [pattern]) for name in names)] + [
        pattern for pattern in config.modules or {} if not any(matches(name, pattern) for name in names)
    ]


def _check_patterns(patterns: Iterable[str]) -> None:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"modules_to_not_convert: {pattern!r} is not a regular expression ({error})") from None


def _check_stack(name: str, stack: Stack, dtype: torch.dtype, config: QuipConfig) -> int:
    """Bytes of all codes, su and sv. Raises `ValueError` for a codebook or a rounding method that experts cannot have."""
    if not config.is_mixed:
        stacked_grids(stack, config.codebook_spec, name)
    if config.is_calibrated and rounding.get(config.rounding).two_sided:
        raise ValueError(
            f"{name}: rounding={config.rounding!r} needs Hessians of both sides, which are not measured for experts: "
            f"choose another method for them (modules={{'experts.*': {{'rounding': 'ldlq'}}}})"
        )
    return stack.experts * _packed_bytes(name, (stack.rows, stack.columns), dtype, config)


def _embeddings(model: nn.Module, config: QuipConfig) -> list[PlanEntry]:
    """The embeddings that `config.modules` asks to quantize."""
    entries, tied = [], None
    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding) or not is_called(name, config.modules or {}):
            continue
        if not is_dense_embedding(module):
            why = "limits the norm of its rows" if type(module) is nn.Embedding else f"is a {type(module).__name__}"
            raise ValueError(
                f"modules names {name!r}, which {why}: only a plain nn.Embedding can be quantized, leave it dense"
            )
        tied = tied_modules(model) if tied is None else tied
        if name in tied:
            raise tied_error(name)
        shape, own = linear_shape(module), config.for_module(name)
        if own.incoherence != config.incoherence and incoherence.sides(own.incoherence)[1] != "none":
            raise ValueError(
                f"modules sets incoherence={own.incoherence!r} for the embedding {name!r}, but rows that are looked up one "
                f"by one can only be transformed on the input side: {[incoherence.sides(own.incoherence)[0], 'none']}"
            )
        sides = (incoherence.sides(own.incoherence)[0], "none")
        size = _packed_bytes(name, shape, module.weight.dtype, own, sides)
        entries.append(PlanEntry(name, shape, module.weight.numel(), quantized=True, packed_bytes=size))
    return entries


def _packed_bytes(
    name: str, shape: tuple[int, int], dtype: torch.dtype, config: QuipConfig, sides: tuple[str, str] | None = None
) -> int:
    """Bytes of codes, su and sv. Raises `ValueError` for a shape that cannot be quantized."""
    for side, size in zip(sides or incoherence.sides(config.incoherence), reversed(shape), strict=True):
        try:
            incoherence.get(side, size, config.seed)
        except ValueError as error:
            raise ValueError(f"{name} has shape {list(shape)}: {error}") from None
    if config.is_mixed:  # its bits are decided later and will be near the average
        return math.ceil(shape[0] * shape[1] * config.bits / 8) + sum(shape) * dtype.itemsize
    book = codebooks.get(config.codebook_spec)
    if book.is_read_only:
        raise ValueError(
            f"{name} cannot be quantized with codebook {book.name!r}: it is for checkpoints that were quantized with it "
            f"elsewhere. Choose one of {', '.join(map(repr, (*codebooks.names(), *codebooks.families())))}"
        )
    try:
        grids = book.tensors(*shape)
    except ValueError as error:
        raise ValueError(f"{name} has shape {list(shape)}: {error}") from None
    return sum(grid.nbytes(dtype) for grid in grids.values()) + sum(shape) * dtype.itemsize


def _without_repetitions(model: nn.Module, entries: list[PlanEntry]) -> list[PlanEntry]:
    """Count a weight that is tied to one outside the linears (the embeddings) there, not here."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    result = []
    for entry in entries:
        key = entry.weight
        elsewhere = key in tied or first[id(model.get_parameter(key))] != key
        result.append(replace(entry, parameters=0) if elsewhere else entry)
    return result


def _rest(model: nn.Module, listed: Iterable[str]) -> Iterator[PlanEntry]:
    """Parameters other than these."""
    weights = set(listed)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for name, parameter in model.named_parameters():
        if name in weights or name in tied:
            continue
        owner = model.get_submodule(name.rpartition(".")[0])
        yield PlanEntry(name, tuple(parameter.shape), parameter.numel(), reason=why_no_linear(owner, parameter))


def _counted(number: int, noun: str, more: str = "") -> str:
    return f" and {number} {noun}{'s' if number > 1 else ''}{more}" if number else ""


def _count(number: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return str(number)
