"""A folder that one caller fills and that appears complete: two callers with the same folder cannot harm each other."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .unfinished import WORK, move_up, remove_dead, work_in

_KEEP = (".git", ".hg", ".svn")
_CONFIG = "config.json"


def check_free(path: Path, overwrite: bool, found: Sequence[str]) -> None:
    """Refuse a place for a model that is taken, before any work is done.

    Args:
        path: of the folder.
        overwrite: whether a model that is there may be replaced.
        found: the names in it that are not the writer's own.

    Raises:
        ValueError: it is a file; or a folder with something in it and `overwrite` is False; or a folder that is not a
            model's (it has no config.json, or it is under version control), whatever `overwrite` is.
    """
    if os.path.lexists(path) and not path.is_dir():
        raise ValueError(f"{path} exists and is not a folder")
    if not found:
        return
    if not overwrite:
        raise ValueError(f"{path} exists and is not empty: choose another place, or add --overwrite (overwrite=True)")
    if not (path / _CONFIG).is_file():
        raise ValueError(
            f"{path} holds {some(found)} but no {_CONFIG}, so it is not a model's folder and --overwrite does not replace "
            "it: choose another place, or remove it yourself"
        )
    kept = [name for name in _KEEP if (path / name).exists()]
    if kept:
        raise ValueError(f"{path} has a {kept[0]}, whose history --overwrite would delete: choose another place")


def some(names: Sequence[str]) -> str:
    """The first three of these names, and the number of the others."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@contextmanager
def claimed_folder(target: Path, last: str) -> Iterator[Path]:
    """A folder inside `target` to write files into, which are moved up into `target` when the block ends without an error.

    After an error `target` is as it was: the files of this block are gone, and files of other programs are untouched. The
    left-overs of a killed run in `target` are removed first, and a warning names them.

    Args:
        target: a folder that is empty or does not exist.
        last: name of the file that is moved last, because others take a folder that has it for complete.

    Raises:
        ValueError: something is in `target`, at the beginning or at the end.
    """
    existed = target.exists()
    if existed and target.is_dir():
        remove_dead(target)
    if existed and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(_taken(target))
    target.mkdir(parents=True, exist_ok=True)
    moved: list[Path] = []
    try:
        with work_in(target) as work:
            yield work
            others = sorted({path.name for path in target.iterdir()} - {WORK})
            if others:
                raise ValueError(f"{target} got {others[0]} from somebody else meanwhile: choose another folder")
            moved.extend(move_up(work, target, last))
    except FileExistsError as error:
        if error.filename == str(target):
            raise ValueError(_taken(target)) from None
        raise
    except BaseException:
        for path in moved:
            path.unlink()
        if not existed and not any(target.iterdir()):
            target.rmdir()
        raise


def _taken(target: Path) -> str:
    where = f"{target} is not empty: give a folder that is, or that does not exist"
    if (target / WORK).is_dir():
        return f"{where} ({WORK} in it is of a run that goes on, or may be: delete it if none does)"
    return where
