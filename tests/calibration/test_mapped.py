"""Files of tensors: their space is taken when they are made, because a mapped write cannot report a full disk."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from transformers_quip.calibration import mapped as module
from transformers_quip.calibration.mapped import mapped

SHAPES = [(2, 3), (4,)]


def test_tensors_are_one_after_the_other(tmp_path):
    path = tmp_path / "file.bin"
    first, second = mapped(path, SHAPES, torch.bfloat16, new=True)
    first.copy_(torch.arange(6).view(2, 3))
    second.copy_(torch.arange(6, 10))
    assert torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.bfloat16).tolist() == list(range(10))
    again = mapped(path, SHAPES, torch.bfloat16, new=False)
    assert torch.equal(again[0], first)
    assert torch.equal(again[1], second)


def test_another_process_may_make_the_same_file(tmp_path):
    path = tmp_path / "file.bin"
    first = mapped(path, SHAPES, torch.float32, new=True)[0].fill_(3)
    second = mapped(path, SHAPES, torch.float32, new=True)[1].fill_(4)
    assert first.tolist() == [[3.0] * 3] * 2
    assert second.tolist() == [4.0] * 4
    assert mapped(path, SHAPES, torch.float32, new=False)[0].tolist() == first.tolist()


def test_another_size_is_refused(tmp_path):
    mapped(tmp_path / "file.bin", SHAPES, torch.float32, new=True)
    with pytest.raises(ValueError, match="has 40 bytes instead of 20"):
        mapped(tmp_path / "file.bin", SHAPES, torch.bfloat16, new=False)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="not on this system")
def test_the_space_is_taken_at_once(tmp_path, monkeypatch):
    mapped(tmp_path / "file.bin", [(1 << 20,)], torch.float32, new=True)
    assert (tmp_path / "file.bin").stat().st_blocks * 512 >= 4 << 20

    def full(*_):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(module.os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"No space left on device: .*other.bin"):
        mapped(tmp_path / "other.bin", SHAPES, torch.float32, new=True)

    def unknown(*_):
        raise OSError(errno.EOPNOTSUPP, "not there")

    monkeypatch.setattr(module.os, "posix_fallocate", unknown)
    assert mapped(tmp_path / "third.bin", SHAPES, torch.float32, new=True)[1].tolist() == [0.0] * 4
