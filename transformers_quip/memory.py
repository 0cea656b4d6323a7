"""The memory that is free on a device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch


def free_memory(device: torch.device) -> int:
    """Bytes that are free on this device; on a CPU within the limit of this process's control group."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil  # type: ignore[import-untyped] # accelerate needs it, too

    free = psutil.virtual_memory().available
    for folder, limit_name, used_name in _control_groups():
        try:
            limit = (folder / limit_name).read_text(encoding="ascii").strip()
            used = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
        except OSError:
            continue
        if limit.isdecimal():  # pages of files are given back when they are needed
            free = min(free, max(int(limit) - int(used.get(used_name, 0)), 0))
    return free


def _control_groups() -> Iterator[tuple[Path, str, str]]:
    """The folders of this process's memory control groups on Linux, with the names of the limit and of what counts."""
    listed, root = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
    for line in listed.read_text(encoding="ascii").splitlines() if listed.is_file() else ():
        number, kinds, path = line.split(":", 2)
        if number == "0":
            yield root / path.lstrip("/"), "memory.max", "anon"
        elif "memory" in kinds.split(","):
            yield root / "memory" / path.lstrip("/"), "memory.limit_in_bytes", "total_rss"
