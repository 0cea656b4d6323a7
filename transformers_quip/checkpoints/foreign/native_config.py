"""The native config of a foreign checkpoint: options for all of its linears, and patterns of names for the differences."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from ...config import QuipConfig
from ...config.patterns import matches
from ...config.storage import Storage
from ..names import compress_names
from .family import Form


class HasForm(Protocol):
    """A quantized linear: its native name, and its native form."""

    @property
    def name(self) -> str: ...

    @property
    def form(self) -> Form: ...


def native_config(linears: Iterable[HasForm], others: Mapping[str, Storage] | None = None) -> QuipConfig:
    """The native config of these linears: the most frequent options for all, and the differences by patterns of names.

    Args:
        linears: at least one.
        others: of further modules.
    """
    linears = list(linears)
    names = [linear.name for linear in linears]
    options: dict[str, dict[str, Any]] = {}
    for linear in linears:
        form = linear.form
        sides = form.incoherence
        values: dict[str, Any] = {"codebook": form.codebook, "residual_scale": form.residual_scale}
        options[linear.name] = {**values, "incoherence": sides[0] if sides[0] == sides[1] else list(sides)}
    # a scale belongs to its codebook
    shared = _most_frequent(options, ("codebook", "residual_scale")) | _most_frequent(options, ("incoherence",))
    different = {}
    for name, values in options.items():
        different[name] = {key: value for key, value in values.items() if value != shared[key]}
        if different[name].keys() & {"codebook", "residual_scale"}:
            different[name] |= {key: values[key] for key in ("codebook", "residual_scale")}
    records = {linear.name: linear.form.storage.to_dict() for linear in linears}
    records.update((name, storage.to_dict()) for name, storage in (others or {}).items())
    config = QuipConfig(**_without_none(shared), modules=by_pattern(different) or None, dataset=None)
    config.quantized_modules = compress_names(names)
    config.storage = _with_common(records)
    return config


def _most_frequent(options: Mapping[str, dict], keys: tuple[str, ...]) -> dict[str, Any]:
    """The values that most modules have for these options together."""
    (text, _), *_ = Counter(repr([values[key] for key in keys]) for values in options.values()).most_common(1)
    return next(
        {key: values[key] for key in keys} for values in options.values() if repr([values[key] for key in keys]) == text
    )


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _with_common(records: Mapping[str, dict]) -> dict[str, dict] | None:
    """Records by patterns; the part common to all is under "*"."""
    every = list(records.values())
    common = {key: value for key, value in every[0].items() if all(other.get(key) == value for other in every)}
    rest = {name: {key: v for key, v in values.items() if key not in common} for name, values in records.items()}
    result = {"*": common} if common else {}
    result.update(by_pattern(rest))
    return result or None


def by_pattern(values: Mapping[str, dict]) -> dict[str, dict]:
    """Options of single modules, those that are alike for all numbers in a name under one shell pattern.

    Args:
        values: name → options; modules without any are given too, so that no pattern means them.
    """
    groups: dict[str, list[str]] = {}
    for name in values:
        groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", name), []).append(name)
    result: dict[str, dict] = {}
    for pattern, names in groups.items():
        first = values[names[0]]
        # a star also means several parts of a name, so that a pattern may match names of another kind
        if len(names) > 1 and all(values[name] == first for name in values if matches(name, pattern)):
            names = [pattern]
        result.update((name, first if name == pattern else values[name]) for name in names)
    return {name: options for name, options in result.items() if options}
