"""A folder that appears whole, and what happens to what others write into it."""

from __future__ import annotations

import pytest

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
