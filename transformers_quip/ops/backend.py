"""Which implementation of the ops runs: chosen by the tensors' device, or by the user."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable

import torch

from quip_kernels import cpu as cpu_kernels

BACKEND_VARIABLE = "TRANSFORMERS_QUIP_BACKEND"
ACTIVATIONS_VARIABLE = "TRANSFORMERS_QUIP_ACTIVATIONS"
ACTIVATIONS = ("auto", "exact", "int8")


def _nothing() -> None:
    return None


def _missing_for_cpu() -> str | None:
    if not cpu_kernels.is_available():
        return "the compiled CPU library; reinstall transformers-quip where there is a C compiler (gcc or clang)"
    return None


def _missing_for_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton (pip install triton)"
    if not (torch.cuda.is_available() or torch.xpu.is_available()):
        return "a GPU that PyTorch can use (CUDA, ROCm or XPU)"
    return None


# What each backend needs and has not; None if it can run.
_MISSING: dict[str, Callable[[], str | None]] = {
    "auto": _nothing,
    "cpu": _missing_for_cpu,
    "reference": _nothing,
    "triton": _missing_for_triton,
}
_chosen = {"backend": "auto", "activations": "auto"}


def set_backend(name: str) -> None:
    """Choose what computes quantized layers.

    The environment variable TRANSFORMERS_QUIP_BACKEND does the same when the package is imported.

    Args:
        name: "auto": the compiled library on the CPU and plain PyTorch on GPUs (the default); "cpu": the compiled library
            for tensors on the CPU; "triton": Triton kernels for tensors on a GPU, which have been tested in Triton's
            interpreter but not yet on a device; "reference": plain PyTorch everywhere.
            With any choice, what the chosen implementation does not cover (other codebooks, float64, other devices)
            runs through the reference.

    Raises:
        ValueError: the name is not one of these.
        RuntimeError: the backend cannot run here; the message says what is missing.
    """
    if name not in _MISSING:
        raise ValueError(f"backend={name!r} is not known, choose one of {', '.join(map(repr, _MISSING))}")
    missing = _MISSING[name]()
    if missing:
        raise RuntimeError(f"The backend {name!r} is not available here: it needs {missing}.")
    _chosen["backend"] = name


def get_backend() -> str:
    """The backend that was chosen, "auto" if none was."""
    return _chosen["backend"]


def uses_triton() -> bool:
    """Whether Triton kernels compute what lies on a GPU."""
    return _chosen["backend"] == "triton"


def set_activations(name: str) -> None:
    """Choose the precision of activations in kernels that multiply them by codes.

    The environment variable TRANSFORMERS_QUIP_ACTIVATIONS does the same when the package is imported.

    Args:
        name: "auto" (the default): on the CPU "int8" for float16 and bfloat16 and "exact" for float32, elsewhere "exact".
            "exact": no loss that the dtype of the activations could show. "int8": faster, with an error of about 0.9 %
            of a layer's output, which cost less than 0.2 % of a 2-bit model's perplexity (`benchmarks/activations.py`).

    Raises:
        ValueError: the name is not one of these.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"activations={name!r} is not known, choose one of {', '.join(map(repr, ACTIVATIONS))}")
    _chosen["activations"] = name


def get_activations() -> str:
    """The precision that was chosen, "auto" if none was."""
    return _chosen["activations"]


def read_environment() -> None:
    """Take over what the environment variables say; raises as [`set_backend`] and [`set_activations`] do."""
    for variable, choose in ((BACKEND_VARIABLE, set_backend), (ACTIVATIONS_VARIABLE, set_activations)):
        try:
            choose(os.environ.get(variable) or "auto")
        except (ValueError, RuntimeError) as error:
            raise type(error)(f"environment variable {variable}={os.environ[variable]}: {error}") from None
