"""The gain on the CPU if the transform of a vector is computed once for all linears that read it.

    python benchmarks/shared_input.py [--seconds S] [--threads N ...]

"apart": each linear is one call into the compiled library, transform included, as in the layers. "shared": one call for
the transform, and one for the rest of each linear; the check that the input is the same is not counted. Both
compute in turns within one run, and medians are compared: 2-bit layers, one bfloat16 vector, 8-bit activations.
Prints a table and writes results/shared_input.json.
"""

from __future__ import annotations

import argparse
import statistics
import time

import machine
import torch

from quip_kernels import cpu_linear as kernels
from transformers_quip import incoherence

# inputs, and the outputs of the linears that read them
GROUPS = {
    "SmolLM2-135M q, k, v": (576, (576, 192, 192)),
    "SmolLM2-135M gate, up": (576, (1536, 1536)),
    "hidden 2048 q, k, v": (2048, (2048, 512, 512)),
    "hidden 2048 gate, up": (2048, (8192, 8192)),
    "Llama-3-8B q, k, v": (4096, (4096, 1024, 1024)),
}


def ways_of(n: int, outputs: tuple[int, ...]) -> dict:
    """The two ways to compute linears of these outputs for one vector of n numbers; checked to agree."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, n, generator=generator).bfloat16()
    su = incoherence.signs(n, 0, "in").bfloat16()
    q_in = kernels.Transform(incoherence.get("hadamard", n, 0).dense_factors)
    linears = []
    for m in outputs:
        codes = torch.randint(-(2**15), 2**15, (m, n // 8), generator=generator).to(torch.int16)
        q_out = kernels.Transform(incoherence.get("hadamard", m, 0).dense_factors)
        linears.append((codes, incoherence.signs(m, 0, "out").bfloat16(), q_out))

    def apart() -> list[torch.Tensor]:
        return [kernels.linear(x, codes, su, sv, None, q_in, q_out, 1) for codes, sv, q_out in linears]

    def shared() -> list[torch.Tensor]:
        t = kernels.transform(x, q_in, True, before=su, dtype=torch.float32)
        return [
            kernels.linear(t, codes, None, sv, None, None, q_out, 1, dtype=torch.bfloat16) for codes, sv, q_out in linears
        ]

    for first, second in zip(apart(), shared(), strict=True):
        error = ((first.float() - second.float()).norm() / first.float().norm()).item()
        if error > 1e-2:
            raise SystemExit(f"the two ways differ by {error:.2g} at {n} inputs")
    return {"apart": apart, "shared": shared}


def measure(ways: dict, seconds: float) -> dict[str, float]:
    """Median microseconds of each way, in turns."""
    times = {name: [] for name in ways}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) * 1e6 for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="for each group (default: 3)")
    parser.add_argument("--threads", type=int, nargs="*", default=[1])
    options = parser.parse_args()
    results = []
    print(f"{'linears':24} {'threads':>7} {'apart µs':>9} {'shared µs':>9} {'gain':>6}")
    for threads in options.threads:
        torch.set_num_threads(threads)
        for name, group in GROUPS.items():
            times = measure(ways_of(*group), options.seconds)
            gain = times["apart"] / times["shared"]
            results.append({"linears": name, "threads": threads, **times, "gain": gain})
            print(f"{name:24} {threads:7} {times['apart']:9.1f} {times['shared']:9.1f} {gain:6.2f}", flush=True)
    machine.save("shared_input", {"groups": results})


if __name__ == "__main__":
    main()
