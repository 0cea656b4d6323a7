"""Which implementation of the ops runs: chosen by the tensors' device, or by the user."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from quip_kernels import cpu as cpu_kernels

from ..codebooks import implementation

BACKEND_VARIABLE = "TRANSFORMERS_QUIP_BACKEND"
ACTIVATIONS_VARIABLE = "TRANSFORMERS_QUIP_ACTIVATIONS"
MEMORY_VARIABLE = "TRANSFORMERS_QUIP_MEMORY"
# Types of devices that the Triton kernels are for.
TRITON_DEVICES = ("cuda", "xpu")
ACTIVATIONS = ("auto", "exact", "int8")
MEMORY = ("auto", "compact", "fast")


def _nothing() -> None:
    return None


def _missing_for_cpu() -> str | None:
    if not cpu_kernels.is_available():
        return "the compiled CPU library; reinstall transformers-quip on a machine with a C compiler (gcc or clang)"
    return None


def _missing_for_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton (pip install triton)"
    if not (torch.cuda.is_available() or torch.xpu.is_available()):
        return "a GPU that PyTorch can use (CUDA, ROCm or XPU)"
    return None


# The missing requirement of each backend; None if it can run.
_MISSING: dict[str, Callable[[], str | None]] = {
    "auto": _nothing,
    "cpu": _missing_for_cpu,
    "reference": _nothing,
    "triton": _missing_for_triton,
}


class Settings(NamedTuple):
    """The user's choices. An object is never changed: another choice makes another one.

    devices: implementations by the type of device, instead of the backend's own. Only tests set it.
    """

    backend: str = "auto"
    activations: str = "auto"
    memory: str = "auto"
    devices: Mapping[str, str] = MappingProxyType({})


_settings = Settings()


def _nothing_is_proved(device: torch.device) -> Collection:
    return ()


_proved: Callable[[torch.device], Collection] = _nothing_is_proved  # where Triton is not installed


def settings() -> Settings:
    """All current choices, for callers that must notice a change."""
    return _settings


def _change(**values: Any) -> None:
    global _settings
    _settings = _settings._replace(**values)


@contextmanager
def overridden(
    backend: str | None = None, activations: str | None = None, devices: Mapping[str, str] | None = None
) -> Iterator[None]:
    """Other settings for a while, for tests: nothing is checked, so that the CPU can stand for a GPU.

    Args:
        backend, activations: see [`set_backend`] and [`set_activations`]; None: unchanged.
        devices: the result of [`for_device`], by type of device; None: unchanged.
    """
    global _settings
    before = _settings
    values = {"backend": backend, "activations": activations, "devices": devices}
    _change(**{name: value for name, value in values.items() if value is not None})
    try:
        yield
    finally:
        _settings = before


def for_device(device: torch.device | str) -> str:
    """The implementation that computes on a device: "cpu" (the compiled library), "triton" or "reference".

    For each device, `route` decides whether it is available and which layers it covers.
    """
    kind = device if isinstance(device, str) else device.type
    chosen = _settings.devices.get(kind)
    if chosen is not None:
        return chosen
    if kind == "cpu":
        return "cpu" if _settings.backend in ("auto", "cpu") else "reference"
    if kind not in TRITON_DEVICES or _settings.backend not in ("auto", "triton"):
        return "reference"
    return "triton" if _settings.backend == "triton" or _proved(torch.device(device)) else "reference"


def is_forced(device: torch.device) -> bool:
    """Whether the user (or a test) has chosen Triton for this device, so that it need not prove anything."""
    chosen = _settings.devices.get(device.type)
    return chosen == "triton" or (chosen is None and _settings.backend == "triton" and device.type in TRITON_DEVICES)


def prove_with(proved: Callable[[torch.device], Collection]) -> None:
    """Say how to find the families of kernels with which a device computes right; none: it is left to the reference."""
    global _proved
    _proved = proved


implementation.encode_with(for_device)


def _check(setting: str, name: str, known: Collection[str]) -> None:
    if name not in known:
        raise ValueError(f"{setting}={name!r} is not known, choose one of {', '.join(map(repr, known))}")


def set_backend(name: str) -> None:
    """Choose the implementation that computes quantized layers, and that encodes weights with a trellis.

    The environment variable TRANSFORMERS_QUIP_BACKEND does the same when the package is imported.

    Args:
        name: "auto" (the default): the compiled library on the CPU, and on a GPU the Triton kernels that compute right
            there, which is tried once on each device (`transformers-quip doctor` shows the outcome); "cpu": the compiled
            library for tensors on the CPU; "triton": all Triton kernels for tensors on a GPU, without trying them;
            "reference": plain PyTorch everywhere.
            With any choice, the reference is the fallback for layers that the chosen implementation does not cover (other
            codebooks, float64, other devices).

    Raises:
        ValueError: the name is not one of these.
        RuntimeError: the backend cannot run here; the message names the missing part.
    """
    _check("backend", name, _MISSING)
    missing = _MISSING[name]()
    if missing:
        raise RuntimeError(f"The backend {name!r} is not available here: it needs {missing}.")
    _change(backend=name)


def get_backend() -> str:
    """The backend that was chosen, "auto" if none was."""
    return _settings.backend


def set_activations(name: str) -> None:
    """Choose the precision of activations in kernels that multiply them by codes.

    The environment variable TRANSFORMERS_QUIP_ACTIVATIONS does the same when the package is imported.

    Args:
        name: "auto" (the default): on the CPU "int8" for float16 and bfloat16 and "exact" for float32, elsewhere "exact".
            "exact": no loss beyond the rounding of the activations' dtype. "int8": faster, with an error of about 0.9 %
            of a layer's output, which cost less than 0.2 % of a 2-bit model's perplexity (`benchmarks/activations.py`).

    Raises:
        ValueError: the name is not one of these.
    """
    _check("activations", name, ACTIVATIONS)
    _change(activations=name)


def get_activations() -> str:
    """The precision that was chosen, "auto" if none was."""
    return _settings.activations


def set_memory(name: str) -> None:
    """Choose whether codes may take more memory where that makes them faster: on ARM, and with AVX2 but not AVX-512.

    There the library multiplies E8P's weights of four bits several times as fast as codes of two bits. The results are the
    same to the bit. With AVX2 it multiplies bytes several times as fast as trellis codes of up to 4 bits: weights are then
    rounded to 8 bits, which changes a layer's output by 0.7 to 1 %, and is only done for activations of 8 bits
    ([`set_activations`]).
    Only memory is different: files, `state_dict`, copies and pickles hold the codes as ever. A layer changes when it is
    loaded or next called. Layers of E8P whose rows are not a multiple of 16, experts and embeddings stay as they are.

    The environment variable TRANSFORMERS_QUIP_MEMORY does the same when the package is imported.

    Args:
        name: "auto" (the default): layer by layer as "fast" as long as 2 GB of memory stay free. "fast": of E8P 4 bits in
            memory for a weight of 2 bits, 8 bits for one of 3 or 4; of a trellis 8 bits more than the codes. "compact": the
            size of the stored codes.

    Raises:
        ValueError: the name is not one of these.
    """
    _check("memory", name, MEMORY)
    _change(memory=name)


def get_memory() -> str:
    """The choice between memory and speed, "auto" if none was made."""
    return _settings.memory


def read_environment() -> None:
    """Apply the environment variables; raises as [`set_backend`], [`set_activations`] and [`set_memory`] do."""
    choices = ((BACKEND_VARIABLE, set_backend), (ACTIVATIONS_VARIABLE, set_activations), (MEMORY_VARIABLE, set_memory))
    for variable, choose in choices:
        try:
            choose(os.environ.get(variable) or "auto")
        except (ValueError, RuntimeError) as error:
            raise type(error)(f"environment variable {variable}={os.environ[variable]}: {error}") from None
