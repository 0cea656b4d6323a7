"""Left-overs of killed runs are named and removed, and processes that live keep theirs."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from tests.cli.child import environment
from tests.cli.test_destination import make, model, names
from transformers_quip.cli import remains
from transformers_quip.cli.destination import new_folder

_KILLED = """
import os, signal, sys
from pathlib import Path
from transformers_quip.cli.destination import new_folder
os.chdir(sys.argv[2])
with new_folder(Path(sys.argv[1]), overwrite=True) as work:
    (work / "config.json").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("before", ["nothing", "empty", "model", "current"])
def test_what_a_killed_run_has_left_is_named_and_removed(tmp_path, capsys, before):
    out = tmp_path / "m"
    if before in ("empty", "current"):
        out.mkdir()
    elif before == "model":
        model(out)
    where = out if before == "current" else tmp_path
    command = [sys.executable, "-c", _KILLED, str(out), str(where)]
    assert subprocess.run(command, env=environment(), check=False).returncode == -signal.SIGKILL
    (left,) = [
        path for path in (*tmp_path.iterdir(), *(out.iterdir() if out.is_dir() else ())) if path.suffix == ".partial"
    ]
    others = model(tmp_path / ".m.abcdefgh.partial.mine"), model(tmp_path / ".m2.abcdefgh.partial")
    assert names(out if out.is_dir() else tmp_path).count("config.json") == (before == "model")
    make(out, overwrite=True)
    assert str(left) in capsys.readouterr().err
    assert names(out) == ["config.json", "new.txt"]
    assert names(tmp_path) == sorted([*(path.name for path in others), "m"])


def test_a_model_that_a_killed_run_had_moved_aside(tmp_path, capsys):
    out = tmp_path / "m"
    model(tmp_path / ".m.abcdefgh.old" / "m")  # killed between the two renamings
    model(tmp_path / ".m.hgfedcba.partial", "new")
    with pytest.raises(ValueError, match="not empty"), new_folder(out):
        pytest.fail("the work was begun")
    assert "back" in capsys.readouterr().err
    assert names(out) == ["config.json", "old.txt"]
    assert names(tmp_path) == ["m"]
    model(tmp_path / ".m.abcdefgh.old" / "m")  # killed after both: it has been replaced
    make(out, overwrite=True)
    assert names(tmp_path) == ["m"]
    model(tmp_path / ".m.abcdefgh.old" / "m", "older")  # killed between, and something else was put there since
    model(tmp_path / ".m.hgfedcba.partial", "new")
    make(out, overwrite=True)
    assert names(tmp_path) == ["m", "m.before-1"]
    assert names(tmp_path / "m.before-1") == ["config.json", "older.txt"]


_WAITING = """
import sys
from pathlib import Path
from transformers_quip.cli.destination import new_folder
with new_folder(Path(sys.argv[1])) as work:
    (work / "config.json").write_text("first")
    print("begun", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize("before", ["nothing", "empty"])
def test_two_processes_with_one_place(tmp_path, before):
    out = tmp_path / "m"
    if before == "empty":
        out.mkdir()
    command = [sys.executable, "-c", _WAITING, str(out)]
    with subprocess.Popen(command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "begun\n"
        for overwrite in (False, True):
            with pytest.raises(ValueError, match="another process is writing to"), new_folder(out, overwrite):
                pytest.fail("the work was begun")
        make(tmp_path / "other")  # another place in the same folder is free
        first.communicate("\n")
    assert first.returncode == 0
    assert (out / "config.json").read_text() == "first"
    assert names(tmp_path) == ["m", "other"]


def test_many_at_once(tmp_path):
    """Of eight that start together one makes it, and the others say why not."""
    out = tmp_path / "m"
    command = [sys.executable, "-c", _WAITING, str(out)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    runs = [subprocess.Popen(command, env=environment(), text=True, **pipes) for _ in range(8)]
    said = [run.communicate("\n")[1] for run in runs]
    codes = [run.returncode for run in runs]
    assert 0 in codes
    assert all(
        "another process is writing" in words or "not empty" in words
        for words, code in zip(said, codes, strict=True)
        if code
    )
    assert names(tmp_path) == ["m"]


def test_where_nothing_can_be_locked(tmp_path, monkeypatch, capsys):
    """NFS without locks: a left-over may be another run's work, so it is named and stays."""
    monkeypatch.setattr(remains, "lock_path", lambda folder: None)
    model(tmp_path / ".m.abcdefgh.partial")
    make(tmp_path / "m")
    assert ".m.abcdefgh.partial may be left over" in capsys.readouterr().err
    assert names(tmp_path) == [".m.abcdefgh.partial", "m"]
