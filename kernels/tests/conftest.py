"""What the tests of kernels on a device share."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(scope="module")
def device():
    """A GPU whose layers run by the Triton kernels; in Triton's interpreter, for benchmarks/rehearse.py, the CPU."""
    import torch

    from transformers_quip import set_backend

    if os.environ.get("TRITON_INTERPRET"):
        from transformers_quip.ops.backend import overridden

        with overridden(devices={"cpu": "triton"}):
            yield torch.device("cpu")
        return
    for kind in ("cuda", "xpu"):
        if getattr(torch, kind).is_available():
            set_backend("triton")
            yield torch.device(kind)
            set_backend("auto")
            return
    pytest.skip("PyTorch cannot use a GPU here")
