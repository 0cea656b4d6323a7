"""Free memory: of the machine, or what is left of the limit of the process's control group."""

from __future__ import annotations

import psutil
import pytest
import torch

from transformers_quip import memory
from transformers_quip.memory import free_memory

CPU = torch.device("cpu")


@pytest.mark.parametrize(("limit", "expected"), [("1000000\n", 1000000 - 300), ("max\n", None), ("200\n", 0)])
def test_control_groups(tmp_path, monkeypatch, limit, expected):
    (tmp_path / "memory.max").write_text(limit)
    (tmp_path / "memory.stat").write_text("anon 300\nfile 900000\n")
    monkeypatch.setattr(memory, "_control_groups", lambda: [(tmp_path, "memory.max", "anon")])
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 5 * 10**9}))
    assert free_memory(CPU) == (5 * 10**9 if expected is None else expected)


def test_without_control_groups(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_control_groups", lambda: [(tmp_path / "none", "memory.max", "anon")])
    assert 0 < free_memory(CPU) <= psutil.virtual_memory().total


def test_where_they_are(monkeypatch, tmp_path):
    """Version 2 has one line with the number 0, version 1 a line for memory."""
    listed = tmp_path / "cgroup"
    listed.write_text("9:name=systemd:/\n4:cpu,memory:/jobs/7\n0::/own\n")
    real = memory.Path
    monkeypatch.setattr(memory, "Path", lambda text: listed if text == "/proc/self/cgroup" else real(text))
    assert [(str(folder), *names) for folder, *names in memory._control_groups()] == [
        ("/sys/fs/cgroup/memory/jobs/7", "memory.limit_in_bytes", "total_rss"),
        ("/sys/fs/cgroup/own", "memory.max", "anon"),
    ]
