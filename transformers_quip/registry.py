"""Names for interchangeable parts: every codebook, transform and rounding method is found by the string in the config."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


def suggest(name: object, known: Iterable[str]) -> str:
    """The end of an error about an unknown name: "; did you mean 'e8p'?", or nothing where no known name is close."""
    close = difflib.get_close_matches(name, list(known), n=1) if isinstance(name, str) else []
    return f"; did you mean {close[0]!r}?" if close else ""


class Registry(Generic[T]):
    """A mapping from a name to an implementation, with errors that list the known names.

    Args:
        kind: the option of the config that names the entries ("codebook", "incoherence", "rounding").
    """

    def __init__(self, kind: str):
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str, entry: T) -> T:
        """Add `entry` under `name` and return it. Raises `ValueError` if the name is taken."""
        if name in self._entries:
            raise ValueError(f"{self.kind} {name!r} is registered already")
        self._entries[name] = entry
        return entry

    def __getitem__(self, name: str) -> T:
        """Raises `ValueError` with the known names if the name is unknown."""
        try:
            return self._entries[name]
        except (KeyError, TypeError):
            raise ValueError(self.unknown(name)) from None

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def names(self) -> tuple[str, ...]:
        """All names, in the order in which they were registered."""
        return tuple(self._entries)

    def unknown(self, name: object) -> str:
        """The text of the error for a name that is not registered."""
        return (
            f"{self.kind}={name!r} is not known, choose one of {', '.join(map(repr, self._entries))}{suggest(name, self)}"
        )
