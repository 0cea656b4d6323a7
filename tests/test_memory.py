"""Free memory: of the machine, or what is left of the limit of the process's control group."""

from __future__ import annotations

import psutil
import pytest
import torch

from quip_kernels import control_groups
from tests.control_groups import pretend
from transformers_quip.memory import free_memory

CPU = torch.device("cpu")


STAT = "anon 300\nfile 900000\ntotal_rss 200"
# The list of groups, the files that there are, and the memory that is left of their limits; None: no limit.
GROUPS = {
    "a limit": ("0::/own\n", {"own/memory.max": "1000000", "own/memory.stat": STAT}, 1000000 - 300),
    "no limit": ("0::/own\n", {"own/memory.max": "max", "own/memory.stat": STAT}, None),
    "more is used": ("0::/own\n", {"own/memory.max": "200", "own/memory.stat": STAT}, 0),
    "a limit of the group above": (
        "0::/all/own\n",
        {
            "all/own/memory.max": "max",
            "all/own/memory.stat": STAT,
            "all/memory.max": "5000",
            "all/memory.stat": "anon 1000",
        },
        4000,
    ),
    "version 1": (
        "9:name=systemd:/\n4:cpu,memory:/jobs/7\n0::/own\n",
        {"memory/jobs/7/memory.limit_in_bytes": "70000", "memory/jobs/7/memory.stat": STAT},
        70000 - 200,
    ),
    "nothing is visible": ("0::/own\n", {}, None),
    "no groups": ("", {}, None),
}


@pytest.mark.parametrize("case", GROUPS)
def test_control_groups(case, tmp_path, monkeypatch):
    listed, files, expected = GROUPS[case]
    pretend(monkeypatch, tmp_path, listed, files)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 5 * 10**9}))
    assert free_memory(CPU) == (5 * 10**9 if expected is None else expected)


def test_where_there_are_none(monkeypatch, tmp_path):
    monkeypatch.setattr(control_groups, "_LIST", tmp_path / "none")
    assert 0 < free_memory(CPU) <= psutil.virtual_memory().total
