"""OUT: decided before the work, never replaced unless asked, nothing lost, left-overs of killed runs cleaned up."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.child import environment
from transformers_quip.cli import destination, renaming
from transformers_quip.cli.destination import check_file, check_not_source, new_folder

ROOT = hasattr(os, "geteuid") and os.geteuid() == 0


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def model(folder: Path, text: str = "old") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(text)
    (folder / f"{text}.txt").write_text(text)
    return folder


def make(path: Path, overwrite: bool = False, text: str = "new") -> None:
    with new_folder(path, overwrite) as work:
        model(work, text)


@pytest.fixture(params=["exchange", "rename twice"])
def system(request, monkeypatch):
    """A system that can exchange two names, and one that cannot."""
    if request.param == "rename twice":
        monkeypatch.setattr(renaming, "_renameat2", lambda: None)
    return request.param


@pytest.mark.parametrize("meanwhile", ["file", "folder", "model", "link"])
@pytest.mark.parametrize("before", ["nothing", "empty"])
def test_what_appears_meanwhile_is_never_replaced(tmp_path, system, before, meanwhile):
    out = tmp_path / "m"
    if before == "empty":
        out.mkdir()

    def run():
        with new_folder(out) as work:
            model(work, "new")
            if meanwhile in ("file", "link") and out.exists():
                out.rmdir()
            if meanwhile == "file":
                out.write_text("precious")
            elif meanwhile == "link":
                (tmp_path / "elsewhere").mkdir()
                out.symlink_to(tmp_path / "elsewhere")
            else:
                out.mkdir(exist_ok=True)
                (out / ("config.json" if meanwhile == "model" else "precious")).write_text("precious")

    with pytest.raises(OSError, match=r"The result is complete, and is kept in .*m\.result-1") as raised:
        run()
    assert str(tmp_path / "m.result-1") in str(raised.value)
    assert (tmp_path / "m.result-1" / "new.txt").read_text() == "new"
    if meanwhile == "link":
        assert out.is_symlink()
        assert names(tmp_path / "elsewhere") == []
    else:
        assert (out if meanwhile == "file" else next(iter(out.iterdir()))).read_text() == "precious"
    assert set(names(tmp_path)) <= {"m", "m.result-1", "elsewhere"}


def test_two_results_that_are_kept_have_two_names(tmp_path):
    for number in (1, 2):
        out = tmp_path / "m"
        with pytest.raises(OSError, match=f"result-{number}"), new_folder(out):
            model(out)
        for path in out.iterdir():
            path.unlink()
        out.rmdir()
    assert names(tmp_path) == ["m.result-1", "m.result-2"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (["precious"], "no config.json"),
        (["model-a/config.json", "model-b/config.json"], "no config.json"),
        (["config.json/x"], "no config.json"),
        ([".hidden"], "no config.json"),
        (["config.json", ".git/HEAD"], "history"),
    ],
)
def test_overwrite_refuses_what_is_not_a_models_folder(tmp_path, content, message):
    out = tmp_path / "models"
    for name in content:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mine")
    with pytest.raises(ValueError, match=message), new_folder(out, overwrite=True):
        pytest.fail("the work was begun")
    assert all((out / name).read_text() == "mine" for name in content)
    assert names(tmp_path) == ["models"]


def test_overwrite_looks_again_at_the_end(tmp_path):
    out = model(tmp_path / "m")

    def run():
        with new_folder(out, overwrite=True) as work:
            model(work, "new")
            (out / "config.json").rename(tmp_path / "config.json")

    with pytest.raises(OSError, match="result-1"):
        run()
    assert names(out) == ["old.txt"]
    assert names(tmp_path / "m.result-1") == ["config.json", "new.txt"]


def test_overwrite(tmp_path, system):
    out = model(tmp_path / "m")
    out.chmod(0o750)
    make(out, overwrite=True)
    assert names(out) == ["config.json", "new.txt"]
    assert out.stat().st_mode & 0o777 == 0o750
    assert names(tmp_path) == ["m"]
    make(tmp_path / "absent", overwrite=True)
    assert names(tmp_path / "absent") == ["config.json", "new.txt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.EIO, "broken disk")])
@pytest.mark.parametrize("call", [1, 2])
def test_a_failure_between_the_two_renamings_puts_the_old_one_back(tmp_path, monkeypatch, error, call):
    monkeypatch.setattr(renaming, "_renameat2", lambda: None)
    out, calls, rename = model(tmp_path / "m"), [], os.rename

    def broken(source, target):
        calls.append(source)
        if len(calls) == call:
            raise error
        rename(source, target)

    def run():
        with new_folder(out, overwrite=True) as work:
            model(work, "new")
            monkeypatch.setattr(renaming.os, "rename", broken)

    with pytest.raises(error if isinstance(error, type) else OSError):
        run()
    assert names(out) == ["config.json", "old.txt"]
    kept = [] if error is KeyboardInterrupt else ["m.result-1"]
    assert names(tmp_path) == ["m", *kept]


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_current_folder(tmp_path, monkeypatch, overwrite):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    make(Path("."), overwrite)
    assert names(here) == names(Path.cwd()) == ["config.json", "new.txt"]
    assert os.path.samefile(here, ".")
    with pytest.raises(ValueError, match="not empty"), new_folder(Path()):
        pytest.fail("the work was begun")
    with pytest.raises(ValueError, match="cannot be replaced as a whole"), new_folder(Path(), overwrite=True):
        pytest.fail("the work was begun")
    assert names(here) == ["config.json", "new.txt"]
    assert names(tmp_path) == ["here"]


def test_a_failure_in_the_current_folder(tmp_path, monkeypatch):
    """Half of it has been moved up: all of it is kept, and what somebody has put there stays."""
    monkeypatch.chdir(tmp_path)

    def run():
        with new_folder(Path()) as work:
            model(work, "new")
            (tmp_path / "a").write_text("mine")

    with pytest.raises(OSError, match="result-1"):
        run()
    result = f"{tmp_path.name}.result-1"
    assert names(tmp_path) == sorted(["a", result])
    assert names(tmp_path / result) == ["config.json", "new.txt"]


needs_mount = pytest.mark.skipif(
    subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode != 0
    if os.path.exists("/usr/bin/unshare")
    else True,
    reason="mounting is not allowed here",
)
_MOUNTED = """
import subprocess, sys
from pathlib import Path
from transformers_quip.cli.destination import new_folder
out = Path(sys.argv[1])
subprocess.run(["mount", *sys.argv[2].split(), str(out)], check=True)
(out / "lost+found").mkdir()
with new_folder(out) as work:
    (work / "config.json").write_text("{}")
    (work / "weights").write_text("w")
print(sorted(path.name for path in out.iterdir()))
try:
    with new_folder(out, overwrite=True):
        print("begun")
except ValueError as error:
    print(error)
"""


@needs_mount
@pytest.mark.parametrize("mount", ["-t tmpfs tmpfs", "--bind OTHER"])
def test_a_mount_point(tmp_path, mount):
    """A container's volume: another file system, or a folder of the same one."""
    out = tmp_path / "volume"
    out.mkdir()
    (tmp_path / "other").mkdir()
    command = ["unshare", "-m", sys.executable, "-c", _MOUNTED, str(out), mount.replace("OTHER", str(tmp_path / "other"))]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    shown, refused = result.stdout.splitlines()
    assert shown == "['config.json', 'lost+found', 'weights']"
    assert "cannot be replaced as a whole" in refused
    assert names(tmp_path) == ["other", "volume"]


_FORBIDDEN = """
import os, sys
from pathlib import Path
from transformers_quip.cli.destination import new_folder
os.setuid(65534)
with new_folder(Path(sys.argv[1])) as work:
    print("begun")
    (work / "config.json").write_text("{}")
print(sorted(path.name for path in Path(sys.argv[1]).iterdir()))
"""


@pytest.mark.skipif(not ROOT, reason="only root can become another user")
@pytest.mark.parametrize(("parent", "own", "works"), [(0o755, None, False), (0o755, 0o777, True), (0o777, None, True)])
def test_places_of_others(parent, own, works):
    """The parent may be another's: then nothing can be made in it, and a folder that is there is written into."""
    import tempfile

    with tempfile.TemporaryDirectory() as top:
        os.chmod(top, 0o755)
        place = Path(top, "parent")
        place.mkdir()
        if own is not None:
            (place / "out").mkdir()
            (place / "out").chmod(own)
        place.chmod(parent)
        command = [sys.executable, "-c", _FORBIDDEN, str(place / "out")]
        result = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
        assert ("begun" in result.stdout) == works, result.stderr
        if works:
            assert result.stdout.splitlines()[1] == "['config.json']"
        else:
            assert "PermissionError" in result.stderr


def test_a_name_that_is_too_long_is_found_out_before(tmp_path):
    with pytest.raises(OSError, match="File name too long"), new_folder(tmp_path / ("x" * 256)):
        pytest.fail("the work was begun")
    assert names(tmp_path) == []
    make(tmp_path / ("ä" * 127))  # 254 bytes
    assert names(tmp_path) == ["ä" * 127]


def test_a_parent_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError), new_folder(tmp_path / "file" / "out"):
        pytest.fail("the work was begun")


def test_parents_are_made_and_removed(tmp_path):
    with pytest.raises(KeyError), new_folder(tmp_path / "a" / "b" / "c"):
        raise KeyError
    assert names(tmp_path) == []
    make(tmp_path / "a" / "b" / "c")
    assert names(tmp_path / "a" / "b") == ["c"]


def test_a_link_is_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "m").symlink_to(tmp_path / "disk")
    make(tmp_path / "m")
    assert (tmp_path / "m").is_symlink()
    assert names(tmp_path / "disk") == ["config.json", "new.txt"]
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="not a folder"), new_folder(tmp_path / "dangling"):
        pytest.fail("the work was begun")


def test_the_model_that_is_read_is_not_replaced(tmp_path):
    source = model(tmp_path / "a" / "dense")
    for out in (source, tmp_path / "a", source / ".." / "dense"):
        with pytest.raises(ValueError, match="the model that is read"):
            check_not_source(out, source)
    check_not_source(source / "quantized", source)
    check_not_source(tmp_path / "new", source)
    check_not_source(tmp_path / "new", "owner/name")


def test_check_file(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(IsADirectoryError):
        check_file(tmp_path / "a")
    check_file(tmp_path / "b" / "report.html")
    assert names(tmp_path / "b") == []
    (tmp_path / "b" / "report.html").write_text("old")
    check_file(tmp_path / "b" / "report.html")
    assert (tmp_path / "b" / "report.html").read_text() == "old"


def test_names_that_are_taken_are_never_renamed_onto(tmp_path, system):
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_text("a")
    b.write_text("b")
    with pytest.raises(FileExistsError):
        renaming.rename_new(a, b)
    b.unlink()
    b.symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError):
        renaming.rename_new(a, b)
    renaming.rename_new(a, tmp_path / "c")
    assert (tmp_path / "c").read_text() == "a"
    assert destination.check_free(tmp_path / "new", overwrite=False) is None
