"""Load the compiled CPU library, and find the instruction sets of this processor."""

from __future__ import annotations

import ctypes
import functools
import logging
import math
import os
import platform
import sys
from pathlib import Path

import torch

from . import control_groups

logger = logging.getLogger(__name__)

PATH = Path(__file__).with_name("_cpu.dll" if sys.platform == "win32" else "_cpu.so")
# Instruction sets of the products, in the order of the C source's numbers, by the kind of processor.
LEVELS_OF = {"x86": ("plain", "avx2", "avx512"), "arm": ("plain", "neon", "dotprod")}
LEVELS = LEVELS_OF["arm" if platform.machine().lower() in ("aarch64", "arm64") else "x86"]
# Those with which weights of four bits (`cpu_nibbles`) are multiplied faster than codes.
LEVELS_FOR_NIBBLES = ("avx2", "neon", "dotprod")
# Those with which trellis codes expanded to bytes (`cpu_records`) are.
LEVELS_FOR_RECORDS = ("avx2",)
LEVEL_VARIABLE = "QUIP_KERNELS_CPU_LEVEL"
MOST_FACTORS = 8  # of a transform, fixed in the C source
MOST_THREADS = 64  # the same


class TransformArguments(ctypes.Structure):
    """`quip_transform` of common.h."""

    _fields_ = (
        ("size", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("power", ctypes.c_int64),
        ("orders", ctypes.c_int64 * MOST_FACTORS),
        ("factors", ctypes.c_void_p * MOST_FACTORS),
        ("transposed", ctypes.c_void_p * MOST_FACTORS),
        ("signs", ctypes.c_void_p * MOST_FACTORS),
        ("signs_transposed", ctypes.c_void_p * MOST_FACTORS),
    )


class LayerArguments(ctypes.Structure):
    """`quip_layer` of common.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "residual", "su", "sv", "bias", "transform_in", "transform_out")),
        *((name, ctypes.c_int64) for name in ("n", "m")),
        ("residual_scale", ctypes.c_double),
        *((name, ctypes.c_int32) for name in ("su_type", "sv_type", "bias_type", "second", "nibbles")),
    )


class TransformCall(ctypes.Structure):
    """`quip_transform_call` of common.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "y", "before", "after", "bias", "transform")),
        *((name, ctypes.c_int64) for name in ("count", "x_stride")),
        *((name, ctypes.c_int32) for name in ("x_type", "y_type", "before_type", "after_type", "bias_type")),
        *((name, ctypes.c_int32) for name in ("transpose", "threads", "failed")),
        ("vectors", ctypes.c_void_p * 3),
    )


class TrellisArguments(ctypes.Structure):
    """`quip_trellis` of trellis.h."""

    _fields_ = (
        ("layer", LayerArguments),
        ("table", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("code", "pair_bits", "order", "step", "table_bits", "table_type", "form")),
    )


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library; None if it does not exist, or does not load (with a warning)."""
    if not PATH.exists():
        logger.debug("quip_kernels: no compiled CPU library next to %s, using PyTorch", __file__)  # callers report it
        return None
    try:
        found = ctypes.CDLL(str(PATH))
    except OSError as error:
        logger.warning("quip_kernels: the compiled CPU library does not load (%s), using PyTorch", error)
        return None
    pointer, size, number, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
    for name, result, arguments in (
        ("quip_encode", None, [pointer, size, number, real, pointer, pointer, number]),
        ("quip_round_panel", number, [pointer] * 3 + [size] * 2 + [number, real] + [pointer] * 3 + [number]),
        ("quip_round_panel_scalar", number, [pointer] * 3 + [size] * 2 + [number] + [pointer] * 3 + [number]),
        ("quip_linear", number, [pointer] * 3 + [size] * 2 + [number] * 5),
        ("quip_decode", None, [pointer, pointer, number, real, size, size, pointer] + [number] * 4),
        ("quip_to_nibbles", None, [number, pointer, size, size, pointer, number]),
        ("quip_from_nibbles", number, [number, pointer, size, size, pointer, number]),
        ("quip_transform_vectors", number, [pointer]),
        ("quip_trellis_linear", number, [pointer] * 3 + [size] * 2 + [number] * 4),
        ("quip_trellis_decode", number, [pointer] * 2 + [number] * 3),
        ("quip_trellis_expand", number, [pointer] * 2 + [number] * 2),
        ("quip_viterbi", number, [pointer, size, pointer] + [number] * 6 + [pointer, number, number]),
        ("quip_has_amx", number, []),
        (
            "quip_linear_many",
            None,
            [pointer] * 3 + [number] + [size] * 2 + [pointer, number, number] + [pointer, size] * 2 + [number],
        ),
        ("quip_cpu_level", number, []),
        ("quip_share_threads", None, [pointer]),
        ("quip_limit_threads", None, [number]),
    ):
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    found.quip_share_threads(_openmp_entry())
    found.quip_limit_threads(granted_processors() or MOST_THREADS)
    return found


def loaded() -> ctypes.CDLL:
    """The library. Raises `RuntimeError` if it is missing: check `cpu.is_available` first."""
    found = library()
    if found is None:
        raise RuntimeError("quip_kernels: the compiled CPU library is missing; check cpu.is_available() first")
    return found


def _openmp_entry() -> int | None:
    """Address of GOMP_parallel in the OpenMP runtime that PyTorch runs on, so that both share one set of threads."""
    if not torch.backends.openmp.is_available() or sys.platform == "win32":
        return None
    # PyTorch makes the libraries that it depends on visible to the whole process.
    entry = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    return None if entry is None else ctypes.cast(entry, ctypes.c_void_p).value


def granted_processors() -> int | None:
    """Processors whose time the control groups of this process grant it on Linux, rounded up; None without such a limit.

    PyTorch does not know this limit, so in a container it may start more threads than can run.
    """
    found = [_share_of(folder, version) for folder, version in control_groups.folders("cpu")]
    shares = [share for share in found if share is not None]
    return max(1, math.ceil(min(shares))) if shares else None


def _share_of(folder: Path, version: int) -> float | None:
    """Processors that one control group grants; None if it has no limit, or is not visible from here."""
    try:
        if version == 2:
            quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text(encoding="ascii") for name in ("quota", "period"))
    except OSError:  # the root has no such file, and a container may not see its own folder
        return None
    return None if quota.strip() in ("max", "-1") else int(quota) / int(period)


@functools.cache
def default_level() -> int:
    """The instruction set of the products: the best of this processor, or the one in QUIP_KERNELS_CPU_LEVEL.

    Raises:
        ValueError: the variable does not name a level, or names one that this processor does not have.
    """
    best: int = loaded().quip_cpu_level()
    wanted = os.environ.get(LEVEL_VARIABLE, "")
    if not wanted:
        return best
    if wanted not in LEVELS[: best + 1]:
        raise ValueError(f"{LEVEL_VARIABLE}={wanted!r} must be one of {', '.join(LEVELS[: best + 1])} on this processor")
    return LEVELS.index(wanted)
