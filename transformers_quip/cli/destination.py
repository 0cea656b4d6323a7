"""A folder that appears whole or not at all.

Everything that can be known about OUT is checked before the work: [`new_folder`] makes a work folder, and proves that it
can take OUT's place. Where OUT cannot be renamed (a mount point, the current folder, a folder whose parent
may not be written to), the work folder lies in OUT, and its files are moved up at the end, config.json last.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..checkpoints import claimed
from . import remains, renaming

# Folders that a file system puts into a new volume.
_VOLUME = ("lost+found",)
_CONFIG = "config.json"


def check_free(path: Path, overwrite: bool) -> None:
    """Refuse a place that is taken, before any work is done; see [`checkpoints.claimed.check_free`]."""
    claimed.check_free(path, overwrite, _content(path))


def check_not_source(path: Path, source: str | Path) -> None:
    """Refuse an OUT that would replace the model that is read.

    Raises:
        ValueError: `source` is a folder, and `path` is the same folder or holds it.
    """
    folder, out = Path(source), path.resolve()
    if folder.is_dir() and out.is_dir() and (out == folder.resolve() or out in folder.resolve().parents):
        raise ValueError(f"{path} is or holds the model that is read ({source}): choose another place for the new one")


def check_file(path: Path) -> None:
    """Refuse a file that could not be written when the work is done; its folder is made if it is not there.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists():
        path.open("ab").close()
    with tempfile.NamedTemporaryFile(prefix=f".{remains.short(path.name)}.", dir=path.parent):
        pass


@contextmanager
def new_folder(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into, which takes the place of `path` when the block ends without an error.

    After an error, Ctrl-C included, `path` is as it was and nothing else is left. The leftovers of a killed run for the
    same `path` are removed first. A result that cannot take its place is kept under a name that the error tells.

    Args:
        path: a link is followed.
        overwrite: whether a model's folder that is there may be replaced. Without it nothing is ever replaced.

    Raises:
        ValueError: see [`check_free`]; or another process is writing to `path`.
        OSError: it cannot be written, which is found out before the block is entered as far as it can be; or the result
            could not take its place. A SafetensorError of the block is raised as OSError too.
    """
    check_free(path, overwrite)
    place = path.resolve()
    with remains.working_folder(place, _make_work) as work:
        # Checked again, because the leftovers of a killed run are now deleted, or back in their place.
        check_free(path, overwrite)
        inside = work.parent == place
        if inside and any(name != work.name for name in _content(place)):
            raise ValueError(
                f"{path} is a mount point, the current folder, or in a folder that may not be written to, so it cannot be "
                "replaced as a whole: empty it yourself, or name a new folder inside it"
            )
        with _as_os_error(path):
            yield work
        _open_to_others(work, place)
        try:
            if inside:
                _move_up(work, place)
            elif overwrite and place.is_dir() and _content(place):
                check_free(path, overwrite)  # it may be another folder by now
                renaming.replace(work, place)
            else:
                os.rename(work, place)  # the system refuses if anything is there
        except (OSError, ValueError) as error:
            raise OSError(
                f"{path} could not be put in its place ({error}). The result is complete, and is kept in "
                f"{_keep(work, place)}: move it to where you want it"
            ) from error


def _make_work(place: Path) -> Path:
    """Make the work folder where its content can take its place: next to `place`, or else in it.

    Raises:
        OSError: neither can be written to.
    """
    if not place.is_dir():
        work = _make(place.parent, place.name)
        try:
            os.rename(work, place)  # to prove that it can be done, and that the name is allowed
        except BaseException:
            work.rmdir()
            raise
        os.rename(place, work)
        return work
    inner = _make(place, place.name)
    if place in (Path.cwd().resolve(), *Path.cwd().resolve().parents):
        return inner  # a shell whose current folder it is would be left in a deleted folder
    try:
        outer = _make(place.parent, place.name)
    except OSError:
        return inner
    try:
        os.rename(outer, place)  # cannot succeed, as `inner` is there; the reason tells whether it could be replaced
    except OSError as error:
        replaceable = error.errno in (errno.ENOTEMPTY, errno.EEXIST)
    if not replaceable:
        outer.rmdir()
        return inner
    inner.rmdir()
    return outer


def _make(parent: Path, name: str) -> Path:
    return Path(tempfile.mkdtemp(prefix=f".{remains.short(name)}.", suffix=remains.PARTIAL, dir=parent))


def _content(path: Path) -> list[str]:
    """The names in a folder, except the file system's own and work folders of this program."""
    if not path.is_dir():
        return []
    ours = remains.pattern(path.resolve().name)
    return sorted(entry for entry in os.listdir(path) if entry not in _VOLUME and not ours.fullmatch(entry))


def _open_to_others(work: Path, place: Path) -> None:
    """Give the work folder, until now its owner's only, the mode of the folder that it replaces, or the usual one."""
    if place.is_dir():
        shutil.copymode(place, work)
    else:
        umask = os.umask(0)
        os.umask(umask)
        work.chmod(0o777 & ~umask)


def _move_up(work: Path, place: Path) -> None:
    """Move everything in `work` into `place`, which is empty otherwise; config.json last, which marks a complete model."""
    taken = [name for name in _content(place) if name != work.name]
    if taken:
        raise FileExistsError(errno.EEXIST, f"there is {claimed.some(taken)} by now", str(place))
    names = sorted(os.listdir(work), key=lambda name: (name == _CONFIG, name))
    moved = []
    try:
        for name in names:
            renaming.rename_new(work / name, place / name)
            moved.append(name)
        work.rmdir()
    except BaseException:
        for name in reversed(moved):
            os.rename(place / name, work / name)
        raise


def _keep(work: Path, place: Path) -> Path:
    """Give a complete result a name that everybody sees and that no later run removes."""
    for number in range(1, 1000):
        kept = work.parent / f"{remains.short(place.name)}.result-{number}"
        try:
            renaming.rename_new(work, kept)
            return kept
        except FileExistsError:
            continue
        except OSError:
            break
    remains.forget(work)
    return work


@contextmanager
def _as_os_error(path: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
