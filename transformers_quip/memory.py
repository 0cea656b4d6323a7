"""The memory that is free on a device."""

from __future__ import annotations

import torch

from quip_kernels import control_groups

# By the version of control groups: the file with the limit, and what counts in the file memory.stat.
_FILES = {1: ("memory.limit_in_bytes", "total_rss"), 2: ("memory.max", "anon")}


def free_memory(device: torch.device) -> int:
    """Bytes that are free on this device; on a CPU within the limit of this process's control group."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil  # type: ignore[import-untyped] # accelerate needs it, too

    free = psutil.virtual_memory().available
    for folder, version in control_groups.folders("memory"):
        limit_name, used_name = _FILES[version]
        try:
            limit = (folder / limit_name).read_text(encoding="ascii").strip()
            used = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
        except OSError:
            continue
        if limit.isdecimal():  # pages of files are given back when they are needed
            free = min(free, max(int(limit) - int(used.get(used_name, 0)), 0))
    return free
