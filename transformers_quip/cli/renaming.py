"""Renaming without loss: two folders are exchanged, or a name that is taken is left alone."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from . import remains
from .console import tell

_HERE = -100  # AT_FDCWD
_NO_REPLACE, _EXCHANGE = 1, 2
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)


@functools.cache
def _renameat2() -> Callable[..., int] | None:
    """The system call; None if it is missing (systems other than Linux, old C libraries)."""
    try:
        return ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return None


def _rename_with(source: Path, target: Path, flag: int) -> bool:
    """Rename by the system call; False, with nothing done, if the system does not support it.

    Raises:
        OSError: it is supported and failed.
    """
    call = _renameat2()
    if call is None:
        return False
    if call(_HERE, os.fsencode(source), _HERE, os.fsencode(target), ctypes.c_uint(flag)) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(source), None, str(target))


def rename_new(source: Path, target: Path) -> None:
    """Rename, but never onto anything.

    Raises:
        FileExistsError: something is at `target`.
        OSError: it cannot be done.
    """
    if _rename_with(source, target, _NO_REPLACE):
        return
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(source), None, str(target))
    os.rename(source, target)


def replace(new: Path, place: Path) -> None:
    """Put the folder `new` at `place` and delete the folder that was there.

    If the system can exchange names, one of the two folders is at `place` at every moment. Otherwise both are renamed, and
    if the second renaming fails (Ctrl-C too), the old folder is put back.

    Raises:
        OSError: it cannot be done; `place` and `new` are as they were.
    """
    if _rename_with(new, place, _EXCHANGE):
        _delete(new)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{remains.short(place.name)}.", suffix=remains.OLD, dir=place.parent))
    old = aside / place.name
    try:
        os.rename(place, old)
        os.rename(new, place)
    except BaseException:
        if old.exists() and not place.exists():
            os.rename(old, place)
        if not old.exists():
            aside.rmdir()
        raise
    _delete(aside)


def _delete(folder: Path) -> None:
    """Delete the replaced folder. A failure is not an error, because the new model is already in its place."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        tell(f"The old folder could not be deleted and is still in {folder} ({error})")
