"""Files that are on the disk completely or not at all, whatever stops the process; and how two runs differ."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

TEMPORARY = ".tmp"


@contextmanager
def durable(path: Path) -> Iterator[Path]:
    """A name to write to. When the block ends its content is on the disk under `path`; after an error `path` is as it was.

    A process that is killed leaves the other name, which ends in ".tmp" ([`remove_temporary`]).

    Raises:
        OSError: the disk is full, for example.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(PermissionError):  # Windows flushes only what is open for writing, and no folders
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_temporary(folder: Path) -> None:
    """Remove what writers that were killed have left in a folder that no other process writes to."""
    for path in folder.glob(f"*{TEMPORARY}"):
        path.unlink()


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between two descriptions of a run, one sentence each: "bits was 2 and is 3"."""
    found = []
    for key in dict.fromkeys((*before, *now)):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} was {_short(old)} and is {_short(new)}")
    return found


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
