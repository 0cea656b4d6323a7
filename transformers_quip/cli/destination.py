"""A folder that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_free(path: Path, overwrite: bool) -> None:
    """Refuse a place that is taken, before any work is done.

    Raises:
        ValueError: it is a file, or a folder with something in it.
    """
    if path.is_file() or path.is_symlink():
        raise ValueError(f"{path} exists and is no folder")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise ValueError(f"{path} exists and is not empty: choose another place, or add --overwrite")


@contextmanager
def new_folder(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder beside `path` to write into, which takes its place when the block ends without an error.

    After an error, Ctrl-C included, `path` is as it was and nothing is left beside it.

    Raises:
        ValueError: see [`check_free`].
        OSError: it cannot be written; so that of safetensors, too, which has an exception of its own for a full disk.
    """
    check_free(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        with _as_os_error(path):
            yield work
        umask = os.umask(0)
        os.umask(umask)
        work.chmod(0o777 & ~umask)  # mkdtemp's folders are for their owner only
        old = None
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
            path.rename(old / path.name)
        work.rename(path)
        if old is not None:
            shutil.rmtree(old)
    finally:
        if work.exists():
            shutil.rmtree(work)


@contextmanager
def _as_os_error(path: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
