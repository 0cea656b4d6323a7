"""Names of modules in a short form, as config.json lists them: layers.{0-31}.mlp.up_proj."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator

_RANGES = re.compile(r"\{(\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*)\}")
# The names that one config may list. 128 layers of 512 experts with 3 linears each are 196,608.
MOST = 1_000_000
# Digits of a number of a layer or an expert.
_DIGITS = 9


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


def expand_names(names: Iterable[str]) -> Iterator[str]:
    """The module names that [`compress_names`] folded, one after the other; they are not held in memory.

    Raises:
        ValueError: before the first name, if a range is not valid, or if there are more than `MOST` names.
    """
    folded = []
    count = 0
    for name in names:
        parts = [_runs(part, name) for part in name.split(".")]
        count += math.prod(sum(map(len, part)) for part in parts if not isinstance(part, str))
        if count > MOST:
            raise ValueError(f"quantized_modules: {_short(name)} and the names before it mean more than {MOST:,} modules")
        folded.append(parts)
    return (expanded for parts in folded for expanded in _expand(parts))


def _runs(part: str, name: str) -> str | list[range]:
    """The numbers that a part of a name means, or the part itself."""
    match = _RANGES.fullmatch(part)
    if match is None:
        return part
    runs = []
    for run in match[1].split(","):
        first, _, last = run.partition("-")
        last = last or first
        if max(len(first), len(last)) > _DIGITS or int(first) > int(last):
            raise ValueError(
                f"quantized_modules: {_short(name)} has {_short(run)}, which is not a range of numbers of modules"
            )
        runs.append(range(int(first), int(last) + 1))
    return runs


def _expand(parts: list[str | list[range]]) -> Iterator[str]:
    choices = [[part] if isinstance(part, str) else map(str, itertools.chain(*part)) for part in parts]
    return (".".join(chosen) for chosen in itertools.product(*choices))


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:77]}...")
