"""The instruction sets of the processor that runs the tests."""

from __future__ import annotations

import pytest

from quip_kernels import cpu_library


def processor_has(level: int) -> int:
    """This instruction set, an index of `cpu_library.LEVELS`; a test is skipped if its processor does not have it."""
    if level > cpu_library.library().quip_cpu_level():
        pytest.skip(f"this processor has no {cpu_library.LEVELS[level]}")
    return level
