"""A folder that appears whole, and what happens to what others write into it."""

from __future__ import annotations

import os
import signal

import pytest

from transformers_quip.checkpoints import unfinished
from transformers_quip.checkpoints.claimed import claimed_folder


def _write(work, error=None, theirs=None):
    for name in ("config.json", "model.safetensors"):
        (work / name).write_text("mine")
    if theirs is not None:
        (theirs / "config.json").write_text("theirs")
    if error is not None:
        raise error


@pytest.mark.parametrize("existed", [True, False])
def test_it_appears_whole(existed, tmp_path):
    target = tmp_path / "a" / "out"
    if existed:
        target.mkdir(parents=True)
    with claimed_folder(target, last="config.json") as work:
        (work / "config.json").write_text("1")
        (work / "model.safetensors").write_text("2")
        assert not (target / "config.json").exists()
    assert {path.name: path.read_text() for path in target.iterdir()} == {"config.json": "1", "model.safetensors": "2"}


@pytest.mark.parametrize("existed", [True, False])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_error_it_is_as_it_was(error, existed, tmp_path):
    target = tmp_path / "out"
    if existed:
        target.mkdir()
    with pytest.raises(error), claimed_folder(target, last="config.json") as work:
        _write(work, error)
    assert target.exists() == existed
    assert not existed or not list(target.iterdir())


def test_two_of_one_folder(tmp_path):
    """The second is refused, and its error costs the first one nothing."""
    target = tmp_path / "out"
    with claimed_folder(target, last="config.json") as work:
        (work / "config.json").write_text("first")
        with (
            pytest.raises(ValueError, match=r"is not empty.*\.partial in it is of a run that goes on"),
            claimed_folder(target, last="config.json"),
        ):
            pass
    assert (target / "config.json").read_text() == "first"
    with (
        pytest.raises(ValueError, match="is not empty: give a folder that is, or that does not exist$"),
        claimed_folder(target, last="config.json"),
    ):
        pass
    assert (target / "config.json").read_text() == "first"


@pytest.mark.parametrize("fails", [True, False])
def test_what_somebody_else_wrote_meanwhile_stays(fails, tmp_path):
    """Also a file of a name that this block writes: it is not replaced."""
    target = tmp_path / "out"
    with (
        pytest.raises(ValueError, match="broken" if fails else r"got config\.json from somebody else"),
        claimed_folder(target, last="config.json") as work,
    ):
        _write(work, ValueError("broken") if fails else None, theirs=target)
    assert {path.name: path.read_text() for path in target.iterdir()} == {"config.json": "theirs"}


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(ValueError, match="is not empty"), claimed_folder(tmp_path / "out", last="config.json"):
        pass
    assert (tmp_path / "out").read_text() == "x"


def _kill_while(target, code):
    """A process that stops itself for good inside the block."""
    pid = os.fork()
    if not pid:
        with claimed_folder(target, last="config.json") as work:
            _write(work)
            if code == "moving":
                next(unfinished.move_up(work, target, "config.json"))
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)


@pytest.mark.parametrize("moment", ["writing", "moving"])
def test_what_a_killed_run_has_left_is_named_and_removed(moment, tmp_path, caplog):
    target = tmp_path / "out"
    _kill_while(target, moment)
    assert sorted(path.name for path in target.iterdir()) == [".partial", "model.safetensors"][: 1 + (moment == "moving")]
    with claimed_folder(target, last="config.json") as work:
        (work / "config.json").write_text("new")
    assert [path.name for path in target.iterdir()] == ["config.json"]
    assert str(target / ".partial") in caplog.text


def test_a_list_of_moved_files_cannot_name_others(tmp_path):
    """It may come from somebody else's folder."""
    target, other = tmp_path / "out", tmp_path / "precious"
    other.write_text("x")
    (target / ".partial").mkdir(parents=True)
    (target / ".partial" / ".moving").write_text(f"../precious\n{other}\n..\n.\n")
    unfinished.remove_dead(target)
    assert other.read_text() == "x"
    assert list(target.iterdir()) == []
