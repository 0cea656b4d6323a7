"""The machine and the versions that a figure comes from, and the folder of results."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

# BENCHMARK_RESULTS: another folder, for runs that are not meant to replace the published figures
RESULTS = Path(os.environ.get("BENCHMARK_RESULTS") or Path(__file__).resolve().parent / "results").absolute()


def describe() -> dict:
    """Return the facts that a reader needs to judge a timing; none of them identifies the machine itself."""
    from quip_kernels import cpu, cpu_library

    packages = ("torch", "triton", "transformers", "accelerate", "safetensors", "numpy")
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {name: found for name in packages if (found := _version(name))},
        "compiled_cpu_library": cpu.is_available(),
        "cpu_level": cpu_library.LEVELS[cpu_library.default_level()] if cpu.is_available() else None,
    }


def named(name: str) -> str:
    """The name of results: where QUIP_KERNELS_CPU_LEVEL chooses instructions, it ends with them ("generate-avx2")."""
    level = os.environ.get("QUIP_KERNELS_CPU_LEVEL")
    return f"{name}-{level}" if level else name


def save(name: str, content: dict) -> Path:
    """Write `content` and the machine's description to results/NAME.json atomically, and return its path.

    The file has the name that [`named`] gives it.
    """
    name = named(name)
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"machine": describe(), **content}, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    print(f"written: {path.relative_to(RESULTS.parent)}")
    return path


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
