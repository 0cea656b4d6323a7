"""Returning memory: the process shrinks, and nothing that is in use changes."""

import mmap
import sys

import pytest

from transformers_quip.checkpoints import memory

MB = 1 << 20
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def resident(kind):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(kind))


def test_pages_of_a_mapped_file_are_returned_and_read_again(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(bytes(range(256)) * (32 * MB // 256))
    with open(file, "rb") as handle, mmap.mmap(handle.fileno(), 0, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE) as mapped:
        assert sum(mapped[::4096]) == 0
        before = resident("RssFile")
        memory.return_memory([str(tmp_path / "other")])
        assert resident("RssFile") > before - 8 * MB
        memory.return_memory([str(file)])
        if resident("RssFile") > before - 24 * MB:
            pytest.skip("this kernel does not take the advice")
        assert mapped[5000] == 5000 % 256
        assert sum(mapped[1::4096]) == len(mapped) // 4096


def test_changed_pages_of_a_private_map_keep_their_changes(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(bytes(MB))
    with open(file, "r+b") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        mapped[1000] = 7
        memory.return_memory([str(file)])
        assert mapped[1000] == 7


def test_it_happens_each_time_so_many_bytes_are_handled(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(memory, "return_memory", calls.append)
    (tmp_path / "link").symlink_to(tmp_path / "file")
    releaser = memory.PageReleaser([str(tmp_path / "link")], every=100)
    for _ in range(7):
        releaser.handled(30)
    assert calls == [{str(tmp_path / "file")}]
    releaser.handled(30)
    assert len(calls) == 2


def test_a_system_without_it_does_nothing(monkeypatch):
    monkeypatch.setattr(memory, "_libc", lambda: None)
    memory.return_memory(["/dev/null"])
