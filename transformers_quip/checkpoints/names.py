"""The short form in which config.json lists the names of quantized modules."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable

_RANGES = re.compile(r"\{(\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*)\}")


def compress_names(names: Iterable[str]) -> list[str]:
    """Module names in a short form, numbers folded: layers.0.fc, layers.1.fc, layers.3.fc → layers.{0-1,3}.fc.

    The inverse of [`expand_names`].
    """
    rows = [tuple(name.split(".")) for name in names]
    for position in range(max(map(len, rows), default=0)):
        groups: dict[tuple, list[str]] = {}
        for row in rows:
            numeric = position < len(row) and row[position].isdecimal()
            key = (*row[:position], None, *row[position + 1 :]) if numeric else row
            groups.setdefault(key, []).append(row[position] if numeric else "")
        rows = [
            tuple(_fold(values) if part is None else part for part in key) if None in key else key
            for key, values in groups.items()
        ]
    return [".".join(row) for row in rows]


def _fold(values: list[str]) -> str:
    """Numbers as ranges: ["0", "1", "3"] → "{0-1,3}"; a single one stays as it is."""
    if len(values) == 1:
        return values[0]
    runs: list[list[int]] = []
    for value in sorted(map(int, values)):
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return "{" + ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs) + "}"


def expand_names(names: Iterable[str]) -> list[str]:
    """The module names that [`compress_names`] folded."""
    return [expanded for name in names for expanded in _expand(name)]


def _expand(name: str) -> Iterable[str]:
    parts: list[list[str]] = []
    for part in name.split("."):
        match = _RANGES.fullmatch(part)
        if match is None:
            parts.append([part])
            continue
        numbers: list[str] = []
        for run in match[1].split(","):
            first, _, last = run.partition("-")
            numbers.extend(map(str, range(int(first), int(last or first) + 1)))
        parts.append(numbers)
    return (".".join(combination) for combination in itertools.product(*parts))
