"""Compile all kernels of the self-check without a GPU: their number, and the processor time of each part.

    PYTHONPATH=.:kernels/torch-ext python kernels/benchmarks/self_check.py [--target sm_90] [--count] [NAME …]

The parts of `transformers_quip/ops/triton/self_check.py` run with tensors on the CPU and a driver that names a target but
runs nothing, so results are not compared. What remains of a part on a device is the start of its process (printed first)
and of the device's driver: the kernels themselves take milliseconds. --count compiles nothing.
"""

from __future__ import annotations

import argparse
import collections
import os
import resource
import subprocess
import sys
import tempfile
import time
from types import SimpleNamespace
from typing import Any

import torch
import triton
from instructions import TARGETS
from specimen import arch_of, family_of
from triton.runtime.jit import JITFunction

from quip_kernels.gpu import grouped, launch, matvec, small_batch, transform, trellis, tune
from transformers_quip.ops.backend import overridden
from transformers_quip.ops.triton import families, self_check
from transformers_quip.ops.triton.run import linear

CPU = torch.device("cpu")


def processor_seconds() -> float:
    """Of this process and of those that it has started: Triton runs ptxas in one."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def stand_in(target: str, only_count: bool) -> set[tuple[str, str]]:
    """Make every launch compile for a target, and nothing else; returns the kernels with what each is compiled for."""
    gpu, found = TARGETS[target], set[tuple[str, str]]()
    driver = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda _: 0, get_current_target=lambda: gpu)
    triton.runtime.driver.set_active(driver)

    def counted(*, fn: Any, key: str, **_: Any) -> bool:
        found.add((fn.name.rpartition(".")[2], key))
        return only_count  # True: nothing is compiled

    triton.knobs.runtime.jit_cache_hook = counted
    run = JITFunction.run
    JITFunction.run = lambda self, *arguments, grid, warmup, **options: run(
        self, *arguments, grid=grid, warmup=True, **options
    )
    for module in (grouped, launch, matvec, small_batch, transform, trellis):
        for name, value in (("arch", arch_of(gpu)), ("family", family_of(gpu))):
            if hasattr(module, name):
                setattr(module, name, lambda *_, value=value: value)
    tune.SECONDS = 0.0
    families._compare = families._compare_points = lambda *_: None
    torch.equal = lambda *_: True
    torch.empty = torch.zeros  # what no kernel has written is an index all the same
    families.viterbi = SimpleNamespace(search=lambda tiles, *_: torch.zeros(tiles.shape[:2], dtype=torch.int32))
    return found


def check(name: str) -> None:
    """As `self_check.main` does, without a verdict."""
    encoders = {encoder.value: encoder for encoder in self_check.Encoder}
    if name == self_check.LAYER:
        families.whole_layer(CPU, linear)
    elif name in encoders:
        families.encode(encoders[name], CPU)
    else:
        families.check(self_check.Family(name), CPU)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = [*self_check.names(), *self_check.names(self_check.ENCODE)]
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(known))
    parser.add_argument("--target", default="sm_90", choices=list(TARGETS))
    parser.add_argument("--count", action="store_true", help="compile nothing")
    options = parser.parse_args()
    if not options.count:
        begin = processor_seconds()
        subprocess.run([sys.executable, "-c", f"import triton, {self_check.__name__}, {families.__name__}"], check=True)
        print(f"{'start of a process':24} {processor_seconds() - begin:7.1f} s")
    with tempfile.TemporaryDirectory() as folder, overridden(backend="triton", devices={"cpu": "triton"}):
        os.environ["TRITON_CACHE_DIR"] = folder
        for name in options.names or known:
            # each in a process of its own, as the kernels of one part may be those of another
            child = os.fork()
            if child == 0:
                found = stand_in(options.target, options.count)
                begin, moment = processor_seconds(), time.perf_counter()
                check(name)
                counts = collections.Counter(kernel for kernel, _ in found)
                said = ", ".join(f"{count} {kernel}" for kernel, count in counts.items())
                took = f"{processor_seconds() - begin:7.1f} s ({time.perf_counter() - moment:.1f} s of time)"
                print(f"{name:24} {'' if options.count else took} {len(found)} kernels: {said}", flush=True)
                os._exit(0)
            if os.waitpid(child, 0)[1]:
                raise SystemExit(f"{name} failed")


if __name__ == "__main__":
    main()
