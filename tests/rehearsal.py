"""Sizes of tests that need a GPU, and small ones for benchmarks/rehearse.py, where Triton's interpreter stands for it."""

from __future__ import annotations

from typing import TypeVar

from quip_kernels.gpu import launch

Size = TypeVar("Size")


def sized(usual: Size, rehearsed: Size) -> Size:
    """The size on a device, or that of a rehearsal."""
    return rehearsed if launch.interpreted() else usual
