"""Tensors that are kept for later calls are made in a thread of its own.

A caller may be in inference mode, in a function transform (torch.func), or in a mode that fakes or records operations.
Tensors that are made there belong to it: a later call outside cannot use them. A new thread is in none of these.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread
from typing import TypeVar

T = TypeVar("T")


def made_plainly(make: Callable[[], T]) -> T:
    """What `make` returns, or the error that it raises, from a thread of its own."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(make())
        except BaseException as error:  # raised by the caller's thread
            errors.append(error)

    thread = Thread(target=run, name="quip-plain")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
