"""Files that are written whole, and what killed runs leave of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from transformers_quip.checkpoints import unfinished
from transformers_quip.checkpoints.unfinished import write_whole

# Writes a file, and stops for ever just before its temporary file takes its place.
WRITER = """
import os, sys, time
from pathlib import Path
from transformers_quip.checkpoints.unfinished import write_whole
os.replace = lambda *_: (print("ready", flush=True), time.sleep(600))
write_whole(Path(sys.argv[1]), "half")
"""


@pytest.fixture
def writer(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", WRITER, str(tmp_path / "README.md")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_a_killed_run_has_left_is_named_and_removed(writer, tmp_path, caplog):
    left = f".README.md.{writer.pid}.partial"
    write_whole(tmp_path / "README.md", "mine")
    assert names(tmp_path) == [left, "README.md"]  # of a live run: it stays
    assert not caplog.records
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    write_whole(tmp_path / "other", "another file")
    assert left in names(tmp_path)
    write_whole(tmp_path / "README.md", "whole")
    assert names(tmp_path) == ["README.md", "other"]
    assert f"{tmp_path / left}, which a run that was killed has left" in caplog.text
    assert (tmp_path / "README.md").read_text() == "whole"


def test_where_nothing_can_be_locked_age_decides(tmp_path, monkeypatch):
    monkeypatch.setattr(unfinished, "lock_path", lambda path: None)
    old, new = tmp_path / ".README.md.1.partial", tmp_path / ".README.md.2.partial"
    for left in (old, new):
        left.write_text("half")
    os.utime(old, (0, 0))
    write_whole(tmp_path / "README.md", "whole")
    assert names(tmp_path) == [new.name, "README.md"]


def test_an_error_leaves_the_old_file_alone(tmp_path, monkeypatch):
    write_whole(tmp_path / "README.md", "whole")
    monkeypatch.setattr(os, "replace", lambda *_: {}["broken"])
    with pytest.raises(KeyError):
        write_whole(tmp_path / "README.md", "later")
    assert names(tmp_path) == ["README.md"]
    assert (tmp_path / "README.md").read_text() == "whole"
