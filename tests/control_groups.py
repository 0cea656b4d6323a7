"""Control groups for tests, in a folder that stands for those of the system."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from quip_kernels import control_groups


def pretend(monkeypatch: pytest.MonkeyPatch, folder: Path, listed: str, files: Mapping[str, str]) -> None:
    """Let this process find these groups.

    Args:
        folder: an empty one.
        listed: the content of /proc/self/cgroup.
        files: the files of the groups and their contents, by their paths below /sys/fs/cgroup.
    """
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text + "\n")
    (folder / "listed").write_text(listed)
    monkeypatch.setattr(control_groups, "_LIST", folder / "listed")
    monkeypatch.setattr(control_groups, "_ROOT", folder)
