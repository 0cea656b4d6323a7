"""Run one step of gpu_run.sh without a GPU: the CPU and Triton's interpreter stand for it, with small sizes.

    python benchmarks/rehearse.py -m transformers_quip doctor
    python benchmarks/rehearse.py -m pytest ARGUMENTS
    python benchmarks/rehearse.py benchmarks/gpu.py ARGUMENTS
    python benchmarks/rehearse.py benchmarks/gpu_summary.py

`benchmarks/gpu_run.sh --rehearse` puts this program in front of each step, with kernels/tests on the path. Every kernel
computes, so errors in kernels, tests, arguments and results are found. Times mean nothing, and nothing is compiled or
recorded as a CUDA graph.
"""

from __future__ import annotations

import contextlib
import functools
import runpy
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import interpreter  # noqa: F401 - of kernels/tests; before anything imports a kernel
import torch

import transformers_quip
from transformers_quip.ops import backend

OPS = torch.library.Library("quip", "IMPL")
# Tests of what only a device has: compiled code, CUDA graphs, a tuner's clock, a CPU beside it.
NEEDS_A_DEVICE = ("compiled", "graph", "tiles_are_measured", "where_they_run")
MODEL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
}


class Event:
    """A moment, by the host's clock."""

    def __init__(self, enable_timing: bool = False):
        self.moment = 0.0

    def record(self) -> None:
        self.moment = time.perf_counter()

    def synchronize(self) -> None:
        """Nothing is pending on a CPU."""

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds."""
        return max(1e3 * (end.moment - self.moment), 1e-6)


class Stream:
    """Work on a CPU is done when a call returns."""

    def wait_stream(self, other: Stream) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""


class Graph:
    """Calls are made once, while they are recorded, and a replay makes none."""

    def replay(self) -> None:
        """Nothing: a time of a replay means nothing here."""


def stand_in() -> None:
    """Make the parts of torch.cuda that gpu.py uses available on the CPU."""
    properties = SimpleNamespace(name="no GPU: Triton's interpreter", multi_processor_count=1, total_memory=0)
    parts: dict[str, Any] = {
        "is_available": lambda: True,
        "get_device_properties": lambda _: properties,
        "Event": Event,
        "Stream": Stream,
        "CUDAGraph": Graph,
        "current_stream": Stream,
        "stream": lambda _: contextlib.nullcontext(),
        "graph": lambda _, stream: contextlib.nullcontext(),
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "max_memory_allocated": lambda: 0,
    }
    for name, part in parts.items():
        setattr(torch.cuda, name, part)


def compute_by_kernels() -> None:
    """Let the ops run the Triton kernels on tensors of the CPU, as they do on a GPU."""
    from quip_kernels.gpu import viterbi
    from transformers_quip.codebooks import viterbi as encoder
    from transformers_quip.ops import prepared
    from transformers_quip.ops.triton import grouped, run

    # layers whose tensors are on a CPU would go around the ops
    prepared.linear = lambda x, layer: torch.ops.quip.linear(x, *layer)
    prepared.prepare = lambda *_: None

    viterbi.MOST_TOGETHER = 1 << 15  # few large steps: the interpreter takes about as long for each
    encoder.WINDOW, encoder.PASSES = 2, 1  # of all encoders
    with warnings.catch_warnings():  # that another implementation is replaced
        warnings.simplefilter("ignore")
        for function in (run.transform, run.decode, run.linear, run.bundle, grouped.grouped_linear):
            OPS.impl(function.__name__, function, "CPU", allow_override=True)


class SmallTests:
    """A plugin of pytest: of each test function, the first case, and none that needs a device."""

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        seen: set[tuple[Path, str]] = set()
        kept: list[Any] = []
        left: list[Any] = []
        for item in items:
            function = (item.path, item.originalname)
            fits = function not in seen and not any(word in item.originalname for word in NEEDS_A_DEVICE)
            seen.add(function)
            (kept if fits else left).append(item)
        items[:] = kept
        config.hook.pytest_deselected(items=left)


def doctor(arguments: Sequence[str]) -> int:
    """What `doctor` says of this machine, and the check of all families in child processes."""
    from transformers_quip.ops.triton import self_check

    sys.argv = ["transformers_quip", *arguments]
    with contextlib.suppress(SystemExit):
        runpy.run_module("transformers_quip", run_name="__main__", alter_sys=True)
    program = (sys.executable, __file__, "check")
    verdicts: dict[str, str | None] = {}
    for kind in (self_check.RUN, self_check.ENCODE):
        verdicts |= self_check.examine("cpu", program, patience=1800.0, kind=kind)
    for name, reason in verdicts.items():
        print(f"{name}: {'right' if reason is None else reason}", flush=True)
    return int(any(verdicts.values()))


def check(arguments: Sequence[str]) -> int:
    """A child of [`doctor`]."""
    from transformers_quip.ops.triton import self_check

    self_check.main(arguments)
    return 0


def tests(arguments: Sequence[str]) -> int:
    """pytest with the tests that can run here."""
    import pytest

    compute_by_kernels()
    return int(pytest.main(list(arguments), plugins=[SmallTests()]))


def gpu(arguments: Sequence[str]) -> int:
    """benchmarks/gpu.py with small sizes."""
    stand_in()
    compute_by_kernels()
    import gpu as benchmark

    sizes: dict[str, Any] = {
        "DEVICE": torch.device("cpu"),
        "SHAPES": ((48, 64),),
        "EXPERTS": 6,
        "EXPERT_SHAPES": ((16, 24),),
        "ROTATED_BYTES": 1 << 12,
        "COPIED_BYTES": 1 << 20,
        "MODELS": dict.fromkeys(benchmark.MODELS, MODEL),
        "check_values": functools.partial(benchmark.check_values, (96, 128)),
    }
    for name, value in sizes.items():
        setattr(benchmark, name, value)
    vars(transformers_quip)["QuipConfig"] = functools.partial(transformers_quip.QuipConfig, refinement_sweeps=1)
    return benchmark.main([*arguments, "--layers", "1", "--tokens", "2", "--minutes", "30"])


def summary(arguments: Sequence[str]) -> int:
    """benchmarks/gpu_summary.py as it is."""
    import gpu_summary

    return gpu_summary.main()


PROGRAMS: dict[str, Callable[[Sequence[str]], int]] = {
    "-m transformers_quip": doctor,
    "-m pytest": tests,
    "benchmarks/gpu.py": gpu,
    "benchmarks/gpu_summary.py": summary,
    "check": check,
}


def main(arguments: Sequence[str]) -> int:
    words = 2 if arguments[:1] == ["-m"] else 1
    program = PROGRAMS.get(" ".join(arguments[:words]))
    if program is None:
        print(f"benchmarks/rehearse.py runs one of {', '.join(PROGRAMS)}", file=sys.stderr)
        return 2
    with backend.overridden(devices={"cpu": "triton"}):
        return program(arguments[words:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
