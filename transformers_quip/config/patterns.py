"""Shell patterns that mean modules by their names, as options for single modules and records in config.json have them."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable

# What makes a name a pattern.
_WILD = re.compile(r"[*?[]")
# Each becomes two regular expressions, which take up to a millisecond: a config.json must not use up the processor.
MOST_PATTERNS = 1_000
LONGEST = 500


def matches(name: str, pattern: str) -> bool:
    """Whether a shell pattern (`*`, `?`, `[…]`) means this module: its whole name, or what follows some dot of it."""
    if not _WILD.search(pattern):
        return name == pattern or name.endswith(f".{pattern}")
    if "[" not in pattern and len(pattern) - pattern.count("*") > len(name):
        return False  # each of these characters stands for one of the name: no regular expression is needed
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}")


def check_patterns(patterns: Iterable[str]) -> None:
    """Raise `ValueError` for patterns that are longer than names of modules are, or of which there are too many."""
    wild = 0
    for pattern in patterns:
        if len(pattern) > LONGEST:
            raise ValueError(f"has {pattern[:40]!r}… of {len(pattern)} characters: at most {LONGEST} are allowed")
        wild += _WILD.search(pattern) is not None
    if wild > MOST_PATTERNS:
        raise ValueError(
            f"has {wild} patterns with wildcards: at most {MOST_PATTERNS} are allowed; names without are not limited"
        )
