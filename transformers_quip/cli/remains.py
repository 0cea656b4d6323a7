"""Remove the leftovers of killed runs, and leave the work folders of live runs alone.

A work folder is locked (flock on the folder itself) as long as its process lives. The next run with the same OUT looks at
all work folders of that name. A locked folder belongs to a live process; the others are removed. Only one process at a
time looks, makes and locks, under a lock of the parent folder.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..checkpoints.unfinished import lock_path
from .console import tell

PARTIAL, OLD = ".partial", ".old"
_LONGEST = 200  # a file name has 255 bytes at most
_PATIENCE = 30.0  # seconds
_kept: set[Path] = set()


def short(name: str) -> str:
    """The part of OUT's name that is used in the names of work folders."""
    return name.encode()[:_LONGEST].decode(errors="ignore")


def pattern(name: str) -> re.Pattern[str]:
    """The pattern of the names of work folders, and of folders that were moved aside, for an OUT of this name."""
    return re.compile(rf"\.{re.escape(short(name))}\.[a-z0-9_]{{8}}({re.escape(PARTIAL)}|{re.escape(OLD)})")


def forget(work: Path) -> None:
    """Leave this work folder alone when its block ends."""
    _kept.add(work)


@contextmanager
def working_folder(place: Path, make: Callable[[Path], Path]) -> Iterator[Path]:
    """The folder that `make(place)` makes, locked; deleted when the block ends, if it is still there then.

    Raises:
        ValueError: another process is writing to `place`.
        OSError: it cannot be made.
    """
    made = [folder for folder in place.parents if not folder.exists()]
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(place.parent):
            for parent in (place.parent, place):
                _clean(parent, place)
            work = make(place)
            lock = lock_path(work)
        try:
            yield work
        finally:
            if work.is_dir() and work not in _kept:
                shutil.rmtree(work)
            _kept.discard(work)
            if lock is not None:
                os.close(lock)
    except BaseException:
        for folder in made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        raise


def _clean(parent: Path, place: Path) -> None:
    """Remove the leftovers of killed runs in `parent` for `place`.

    Raises:
        ValueError: a live run is writing to it.
    """
    if not parent.is_dir():
        return
    names = pattern(place.name)
    left = sorted(entry for entry in _folders(parent) if names.fullmatch(entry.name))
    partial = [folder for folder in left if folder.suffix == PARTIAL]
    for folder in partial:
        _remove_dead(folder, place)
    for folder in left:
        if folder.suffix == OLD:
            _settle(folder, place, finished=not partial)


def _folders(parent: Path) -> list[Path]:
    try:
        return [Path(entry.path) for entry in os.scandir(parent) if entry.is_dir(follow_symlinks=False)]
    except PermissionError:
        return []


def _remove_dead(folder: Path, place: Path) -> None:
    try:
        lock = lock_path(folder)
    except BlockingIOError:
        raise ValueError(
            f"another process is writing to {place} (its work is in {folder.name}): wait for it, or choose another place"
        ) from None
    if lock is None:
        tell(f"{folder} may be left over from a killed run; this file system cannot tell, so it is kept")
        return
    try:
        shutil.rmtree(folder)
        tell(f"Removed {folder}, left by a killed run")
    finally:
        os.close(lock)


def _settle(folder: Path, place: Path, finished: bool) -> None:
    """A model that a killed run has moved aside: deleted if the new one had taken its place, else put back."""
    old = folder / place.name
    if not old.is_dir() or (finished and place.exists()):
        shutil.rmtree(folder)
        tell(f"Removed {folder}, left by a killed run")
        return
    home = place
    number = 0
    while home.exists():  # somebody has put something else there since
        number += 1
        home = place.with_name(f"{short(place.name)}.before-{number}")
    os.rename(old, home)
    folder.rmdir()
    tell(f"Put back {home}: a run had moved this model aside when it was killed")


@contextmanager
def _one_at_a_time(parent: Path) -> Iterator[None]:
    """Lock the parent folder for the moment in which work folders are looked for and made.

    Raises:
        TimeoutError: another process holds the lock for half a minute.
    """
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            lock = lock_path(parent)
            break
        except BlockingIOError:
            if time.monotonic() > end:
                raise TimeoutError(errno.ETIMEDOUT, "another process has locked this folder", str(parent)) from None
            time.sleep(0.05)
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)
