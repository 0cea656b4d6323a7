"""Work folders and files inside a destination folder: those of killed runs are told from those of live runs.

Each is locked (flock on the folder or file itself) as long as its process lives. The next run that writes to the same
place removes those that are not locked, and says so.
"""

from __future__ import annotations

import contextlib
import glob
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

WORK = ".partial"
# In every work folder: the names of the files that are being moved up from it, one a line.
MOVING = ".moving"


def lock_path(path: Path) -> int | None:
    """Lock a folder or a file for the life of this process; the descriptor, which ends the lock when it is closed.

    Returns:
        None where that cannot be done.

    Raises:
        BlockingIOError: another process has locked it.
    """
    if fcntl is None:
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


@contextmanager
def work_in(target: Path) -> Iterator[Path]:
    """A locked work folder `target`/.partial; it is deleted with its content when the block ends.

    Args:
        target: a folder. Leftovers of killed runs in it are removed first, and a warning names them.

    Raises:
        FileExistsError: another process is writing to `target`; or one may be, where the system cannot tell.
    """
    remove_dead(target)
    made, work = Path(tempfile.mkdtemp(prefix=f"{WORK}.", dir=target)), target / WORK
    held = lock_path(made)
    try:
        # A folder that is not empty is never replaced by a rename.
        (made / MOVING).touch()
        try:
            os.rename(made, work)
        except OSError as error:
            shutil.rmtree(made)
            raise FileExistsError(error.errno, "another process is writing to this folder", str(target)) from None
        try:
            yield work
        finally:
            shutil.rmtree(work)
    finally:
        if held is not None:
            os.close(held)


def remove_dead(target: Path) -> None:
    """Remove the work folders of killed runs in a folder, and the files that they were moving up from there."""
    for work in sorted(path for path in target.glob(f"{WORK}*") if path.is_dir() and not path.is_symlink()):
        if any(work.iterdir()) and not (work / MOVING).is_file():
            continue  # somebody else's
        try:
            held = lock_path(work)
        except BlockingIOError:
            continue
        if held is None:
            continue
        try:
            for name in _moving(work):
                (target / name).unlink(missing_ok=True)
            shutil.rmtree(work)
        finally:
            os.close(held)
        logger.warning("Removed %s, which a run that was killed has left", work)


def move_up(work: Path, target: Path, last: str) -> Iterator[Path]:
    """Move every file of a work folder up, replacing files of the same names; yields each when it is there.

    Args:
        last: name of the file that is moved last, because others take a folder that has it for complete.
    """
    names = sorted((name for name in os.listdir(work) if name != MOVING), key=lambda name: (name == last, name))
    (work / MOVING).write_text("\n".join(names), encoding="utf-8")
    for name in names:
        os.replace(work / name, target / name)
        yield target / name


def _moving(work: Path) -> list[str]:
    """The names in a work folder's list that are names of files, and nothing else."""
    if not (work / MOVING).is_file():
        return []
    names = (work / MOVING).read_text(encoding="utf-8", errors="replace").splitlines()
    return [name for name in names if name and Path(name).name == name and (work.parent / name).is_file()]


def write_whole(path: Path, text: str) -> None:
    """Write a file atomically. A link (as in the Hub client's cache) is replaced; its target stays unchanged.

    Two processes may write at once: one of the two texts remains. Temporary files of killed runs are removed first, and a
    warning names them; where files cannot be locked, those that are older than a minute.
    """
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        _remove_if_dead(left)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    held = None
    try:
        temporary.touch()
        with contextlib.suppress(BlockingIOError, FileNotFoundError):  # another run is just looking
            held = lock_path(temporary)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        if held is not None:
            os.close(held)
        temporary.unlink(missing_ok=True)


def _remove_if_dead(file: Path) -> None:
    with contextlib.suppress(BlockingIOError, FileNotFoundError):  # of a live run
        held = lock_path(file)
        if held is None and time.time() - file.stat().st_mtime < 60:
            return
        file.unlink()
        if held is not None:
            os.close(held)
        logger.warning("Removed %s, which a run that was killed has left", file)
