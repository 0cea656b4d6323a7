"""The control groups of this process on Linux, which limit its memory and the time of its processors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_LIST = Path("/proc/self/cgroup")
_ROOT = Path("/sys/fs/cgroup")


def folders(controller: str) -> Iterator[tuple[Path, int]]:
    """The folders of this process's groups, each followed by those above it, and the version of the interface (1 or 2).

    A limit of any of them counts. A folder need not be visible from here: a container may not see its own.

    Args:
        controller: "cpu" or "memory".
    """
    for line in _LIST.read_text(encoding="ascii").splitlines() if _LIST.is_file() else ():
        number, kinds, path = line.split(":", 2)
        version = 2 if number == "0" else 1
        if version == 1 and controller not in kinds.split(","):
            continue
        root = _ROOT if version == 2 else _ROOT / controller
        own = root / path.lstrip("/")
        for folder in (own, *own.parents):
            yield folder, version
            if folder == root:
                break
