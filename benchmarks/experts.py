"""Experts of a mixture for one token on the CPU: the time of one call for all chosen experts, by their number.

    python benchmarks/experts.py [--repeats 100] [--threads 1]

"apart" are as many quantized linears of the same size, called one after the other. All are timed in turns in one run; the
shortest time of each counts.
"""

from __future__ import annotations

import argparse
import time

import machine
import torch

from transformers_quip import QuipLinear

SIZES = ((2048, 768), (768, 2048))
EXPERTS, CHOSEN = (8, 64, 256), (1, 2, 4, 8)
NAMES = ("e8p", "hadamard", "hadamard", 0)


def ways(experts: int, chosen: int, rows: int, columns: int, dtype: torch.dtype):
    """Functions that compute the chosen experts: in one call, and apart."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-(2**15), 2**15, (experts, rows, columns // 8), generator=generator).to(torch.int16)
    su = torch.randn(experts, columns, generator=generator).to(dtype)
    sv = torch.randn(experts, rows, generator=generator).to(dtype)
    x = torch.randn(chosen, columns, generator=generator).to(dtype)
    own = torch.randperm(experts, generator=generator)[:chosen].sort().values
    ends = torch.searchsorted(own, torch.arange(experts), right=True)
    linears = []
    for expert in own.tolist():
        linear = QuipLinear(columns, rows, False, dtype=dtype)
        for name, value in (("codes", codes[expert]), ("su", su[expert]), ("sv", sv[expert])):
            linear.get_parameter(name).data.copy_(value)
        linears.append(linear)

    def together() -> torch.Tensor:
        return torch.ops.quip.grouped_linear(x, ends, [codes], su, sv, *NAMES)

    def apart() -> torch.Tensor:
        return torch.cat([linear(x[i : i + 1]) for i, linear in enumerate(linears)])

    if not torch.allclose(together(), apart(), rtol=1e-2, atol=1e-1):
        raise SystemExit("the two ways differ")
    return {"together": together, "apart": apart}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for size in SIZES:
            for experts in EXPERTS:
                for chosen in CHOSEN:
                    functions = ways(experts, chosen, *size, dtype)
                    best = dict.fromkeys(functions, float("inf"))
                    with torch.inference_mode():
                        for _ in range(options.repeats):
                            for name, function in functions.items():
                                started = time.perf_counter()
                                function()
                                best[name] = min(best[name], time.perf_counter() - started)
                    microseconds = {name: 1e6 * seconds for name, seconds in best.items()}
                    ratio = best["together"] / best["apart"]
                    row = {"dtype": str(dtype).removeprefix("torch."), "size": list(size), "experts": experts}
                    rows.append({**row, "chosen": chosen, "microseconds": microseconds, "ratio": ratio})
                    print(
                        f"{row['dtype']:9s} {size[0]}x{size[1]} {experts:4d} experts, {chosen} chosen: "
                        f"{microseconds['together']:6.0f} us, apart {microseconds['apart']:6.0f} us, {ratio:.2f}x"
                    )
    machine.save("experts", {"repeats": options.repeats, "threads": options.threads, "rows": rows})


if __name__ == "__main__":
    main()
