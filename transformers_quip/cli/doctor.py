"""doctor: versions, devices, kernels, and which of them computes which layer here."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

import click

from ..version import __version__
from .console import json_option, show, show_json, show_table

_PACKAGES = ("torch", "triton", "transformers", "accelerate", "safetensors", "huggingface-hub", "optimum", "peft")
_VARIABLES = (
    "TRANSFORMERS_QUIP_BACKEND",
    "TRANSFORMERS_QUIP_ACTIVATIONS",
    "TRANSFORMERS_QUIP_MEMORY",
    "QUIP_KERNELS_CPU_LEVEL",
    "QUIP_KERNELS_CACHE",
    "TRITON_INTERPRET",
    "OMP_NUM_THREADS",
)
# A codebook of each kind of kernels, and batch sizes of every route.
_CODEBOOKS = ("e8p", "trellis:mul1:k2:exl3", "scalar2")
_BATCHES = (1, 5, 65)
_SIZES = (4096, 4096)
_HELP = (
    "Triton kernels off: TRANSFORMERS_QUIP_BACKEND=reference, or transformers_quip.set_backend('reference'). "
    "All compiled kernels off on the CPU: the same. All Triton kernels without a check: 'triton'."
)


@click.command()
@json_option
def command(as_json: bool) -> None:
    """Versions, devices, and which kernels compute quantized layers here.

    A GPU that has not been seen before is tried with every Triton kernel, which takes a while; the outcome is kept.
    """
    content = examine()
    if as_json:
        show_json(content)
        return
    show_table("Versions", ("package", "version"), content["versions"].items())
    settings = {**content["settings"], **{name: value for name, value in content["variables"].items() if value is not None}}
    show_table("Settings", ("name", "value"), settings.items())
    for device in content["devices"]:
        show_table(device["name"], ("", ""), device["about"].items())
        if device["kernels"]:
            rows = [(name, "right" if reason is None else reason) for name, reason in device["kernels"].items()]
            show_table(f"Triton kernels on {device['name']}", ("kernels", "verdict"), rows)
        rows = [(codebook, *ways.values()) for codebook, ways in device["routes"].items()]
        show_table(
            f"bfloat16 layers of {_SIZES[0]}x{_SIZES[1]} on {device['name']}",
            ("codebook", *(f"{count} vector{'s' if count > 1 else ''}" for count in _BATCHES)),
            rows,
        )
    show(_HELP)


def examine() -> dict[str, Any]:
    """All that the command shows, as JSON has it."""
    from ..ops import backend

    return {
        "versions": {"transformers-quip": __version__, "python": platform.python_version()}
        | {name: _version(name) for name in _PACKAGES},
        "settings": {"backend": backend.get_backend(), "activations": backend.get_activations()},
        "variables": {name: os.environ.get(name) for name in _VARIABLES},
        "devices": [_cpu(), *_gpus()],
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cpu() -> dict[str, Any]:
    import torch

    from quip_kernels import cpu_library

    from ..ops.backend import for_device

    library = cpu_library.library()
    about = {"compiled library": "missing: reinstall where there is a C compiler", "threads": str(torch.get_num_threads())}
    if library is not None:
        about["compiled library"] = f"for {cpu_library.LEVELS[cpu_library.default_level()]}"
        about["best level here"] = cpu_library.LEVELS[library.quip_cpu_level()]
        about["AMX"] = "yes" if library.quip_has_amx() else "no"
    about["implementation"] = for_device("cpu") if library is not None else "reference"
    return {"name": "CPU", "about": about, "kernels": {}, "routes": {name: _cpu_routes(name) for name in _CODEBOOKS}}


def _cpu_routes(codebook: str) -> dict[str, str]:
    import torch

    from .. import codebooks
    from ..ops import Layer
    from ..ops.cpu import run

    rows, columns = _SIZES
    grids = codebooks.get(codebook).tensors(rows, columns)
    su, sv = (torch.empty(size, dtype=torch.bfloat16, device="meta") for size in (columns, rows))
    weight = [torch.empty(0, dtype=grid.dtype_in(torch.bfloat16), device="meta") for grid in grids.values()]
    plan = run.plan(torch.bfloat16, Layer(weight, su, sv, None, codebook, "hadamard", "hadamard", 0))
    return {str(count): plan.routes.of(count).value for count in _BATCHES}


def _gpus() -> list[dict[str, Any]]:
    import torch

    from .. import codebooks
    from ..ops.triton import route, run, self_check

    found = []
    for kind in ("cuda", "xpu"):
        module = getattr(torch, kind)
        for index in range(module.device_count() if module.is_available() else 0):
            device = torch.device(kind, index)
            verdicts: dict[str, str | None] = {}
            if _version("triton") != "not installed":
                verdicts = self_check.verdicts(device) | self_check.verdicts(device, self_check.ENCODE)
            trusted = run.trusted(device)
            routes = {
                name: {
                    str(count): route.route(codebooks.get(name).kernels, torch.bfloat16, count, trusted).value
                    for count in _BATCHES
                }
                for name in _CODEBOOKS
            }
            about = self_check.versions(device) if verdicts else {"device": module.get_device_name(device)}
            found.append({"name": str(device), "about": about, "kernels": verdicts, "routes": routes})
    return found
