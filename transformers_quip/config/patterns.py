"""The two pattern languages in which options name modules.

`modules` has shell patterns, which also match the end of a name after a dot ([`matches`], [`is_called`]).
`modules_to_not_convert` has Transformers' own language: prefixes, suffixes and regular expressions ([`is_named`]).
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable

# The characters that make a name a pattern.
_WILD = re.compile(r"[*?[]")
# Each becomes two regular expressions, which take up to a millisecond each: a config.json must not block the processor.
MOST_PATTERNS = 1_000
LONGEST = 500


def matches(name: str, pattern: str) -> bool:
    """Whether a shell pattern (`*`, `?`, `[…]`) means this module: its whole name, or the part after one of its dots."""
    if not _WILD.search(pattern):
        return name == pattern or name.endswith(f".{pattern}")
    if "[" not in pattern and len(pattern) - pattern.count("*") > len(name):
        return False  # each of these characters stands for one of the name: no regular expression is needed
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}")


def is_called(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of the shell patterns means this module by name: it matches, and its last part has no wildcard."""
    last = name.rpartition(".")[2]
    return any(matches(name, pattern) and pattern.rpartition(".")[2] == last for pattern in patterns)


def is_named(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns means this module, in the language of Transformers' `modules_to_not_convert`.

    A pattern is a prefix up to a dot, a suffix, or a regular expression that matches from the start up to a dot. Earlier
    versions of Transformers let a prefix end anywhere, so that "layers.1" meant layers.10 too; this function does not.
    """
    return any(name.endswith(pattern) or re.match(rf"(?:{pattern})(?:\.|$|(?<=\.))", name) for pattern in patterns)


def check_patterns(patterns: Iterable[str]) -> None:
    """Raise `ValueError` for patterns longer than any name of a module, or for too many patterns."""
    wild = 0
    for pattern in patterns:
        if len(pattern) > LONGEST:
            raise ValueError(f"has {pattern[:40]!r}… of {len(pattern)} characters: at most {LONGEST} are allowed")
        wild += _WILD.search(pattern) is not None
    if wild > MOST_PATTERNS:
        raise ValueError(
            f"has {wild} patterns with wildcards: at most {MOST_PATTERNS} are allowed; names without are not limited"
        )
