"""A folder that one caller fills and that appears complete: two callers with the same folder cannot harm each other."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# The folder of the files until all are written. Of several callers, `mkdir` lets only one succeed.
WORK = ".partial"


@contextmanager
def claimed_folder(target: Path, last: str) -> Iterator[Path]:
    """A folder inside `target` to write files into, which are moved up into `target` when the block ends without an error.

    After an error `target` is as it was: the files of this block are gone, and files of other programs are untouched.

    Args:
        target: a folder that is empty or does not exist.
        last: name of the file that is moved last, because others take a folder that has it for complete.

    Raises:
        ValueError: something is in `target`, at the beginning or at the end.
    """
    existed = target.exists()
    if existed and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(_taken(target))
    target.mkdir(parents=True, exist_ok=True)
    work = target / WORK
    try:
        work.mkdir()
    except FileExistsError:
        raise ValueError(_taken(target)) from None
    moved: list[Path] = []
    try:
        yield work
        others = sorted({path.name for path in target.iterdir()} - {WORK})
        if others:
            raise ValueError(f"{target} got {others[0]} from somebody else meanwhile: choose another folder")
        for path in sorted(work.iterdir(), key=lambda path: (path.name == last, path.name)):
            path.rename(target / path.name)
            moved.append(target / path.name)
        work.rmdir()
    except BaseException:
        shutil.rmtree(work)
        for path in moved:
            path.unlink()
        if not existed and not any(target.iterdir()):
            target.rmdir()
        raise


def _taken(target: Path) -> str:
    where = f"{target} is not empty: give a folder that is, or that does not exist"
    if (target / WORK).is_dir():
        return f"{where} ({WORK} in it is of a run that goes on, or was killed: delete it if none does)"
    return where
