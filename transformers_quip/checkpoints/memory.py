"""Return memory to the system while weights are quantized as they are read.

Otherwise a process grows to the size of the dense model, although it does not use that memory, for two reasons. The C
library keeps freed blocks between blocks in use. And pages of a checkpoint that were read through a memory map count as
the process's until the system needs them.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Iterable

# From <linux/mman.h>: reclaim these pages now. No data is lost: changed pages go to swap, file pages are read again.
_MADV_PAGEOUT = 21


class PageReleaser:
    """Returns memory to the system each time that a number of bytes has been handled.

    Args:
        files: paths of the checkpoint's files.
        every: bytes; None: a small part of the files, at most 16 MiB.
    """

    def __init__(self, files: Iterable[str] = (), every: int | None = None):
        self._files = {os.path.realpath(file) for file in files}
        if every is None:
            size = sum(os.path.getsize(file) for file in self._files if os.path.isfile(file))
            every = min(16 << 20, max(1 << 20, size // 32)) if size else 16 << 20
        self._every = every
        self._handled = 0

    def handled(self, size: int) -> None:
        """Count `size` more bytes of weights as handled."""
        self._handled += size
        if self._handled >= self._every:
            self._handled = 0
            return_memory(self._files)


def return_memory(files: Iterable[str] = ()) -> None:
    """Return freed memory, and the pages of these mapped files. Does nothing on systems that cannot.

    Args:
        files: real paths.
    """
    libc = _libc()
    if libc is None:
        return
    libc.malloc_trim(0)
    files = set(files)
    if files:
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
            for line in maps:
                # address-address permissions offset device inode path
                span, *_, path = line.rstrip("\n").split(None, 5)
                if path in files:
                    begin, end = (int(address, 16) for address in span.split("-"))
                    libc.madvise(begin, end - begin, _MADV_PAGEOUT)  # advice: an old kernel that refuses is not an error


@functools.cache
def _libc() -> ctypes.CDLL | None:
    """The C library, if it is glibc on Linux."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim") or not hasattr(libc, "madvise"):
        return None
    libc.malloc_trim.argtypes = [ctypes.c_size_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc
