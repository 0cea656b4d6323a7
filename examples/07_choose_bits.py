"""How many bits fit into the available memory? Answered from a model's config alone, before any work.

    python examples/07_choose_bits.py FOLDER --memory 24GB [--context 8192]

FOLDER is a dense model, or its id on the Hub: only its config is read. For 2, 3 and 4 bits it counts codes, su and sv of
every linear, the dense parameters, and the key-value cache. The rest of the memory is spent on a higher average of bits:
modules then get 2, 3 or 4 bits by their importance.

Output for a Llama of 70 billion weights:

    llama-70b: 69 B parameters, 137.95 GB in bfloat16; cache for 4096 tokens: 1.34 GB
    bits  codebook    true bits       weights        needed
       2  e8p             2.003      18.19 GB      19.53 GB  fits
       3  e8p-rvq3        3.003      26.75 GB      28.09 GB  too large
       4  e8p-rvq4        4.003      35.30 GB      36.64 GB  too large
    choose: QuipConfig(bits=2.5)
"""

from __future__ import annotations

import argparse
import math
import re

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from transformers_quip import QuipConfig
from transformers_quip.checkpoints.inventory import Inventory
from transformers_quip.quantize.plan import make_plan

BITS = (2, 3, 4)
UNITS = {"": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a dense model: folder, or id on the Hub")
    parser.add_argument("--memory", type=read_size, required=True, help="such as 24GB, 800MB, 8GiB")
    parser.add_argument("--context", type=int, default=4096, help="tokens to keep in the cache")
    parser.add_argument("--dtype", default="bfloat16", help="type of the dense parameters")
    return parser.parse_args()


def read_size(text: str) -> int:
    match = re.fullmatch(r"([\d.]+)\s*(\w*)", text)
    if not match or match[2] not in UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 24GB, 800MB or 8GiB")
    return int(float(match[1]) * UNITS[match[2]])


def shown(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.3f} MB"


def main(options: argparse.Namespace) -> None:
    config = AutoConfig.from_pretrained(options.model)
    dtype = getattr(torch, options.dtype)
    with torch.device("meta"):  # shapes without memory
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    cache = Inventory(config.to_dict(), {}, (), 0, ()).cache_bytes(options.context) or 0
    print(
        f"{options.model}: {parameters / 1e9:.3g} B parameters, {shown(parameters * dtype.itemsize)} in {options.dtype}; "
        f"cache for {options.context} tokens: {shown(cache)}"
    )
    print(f"bits  {'codebook':<10} {'true bits':>10}  {'weights':>12}  {'needed':>12}")
    best, spare, quantized = None, 0, 1
    for bits in BITS:
        config = QuipConfig(bits=bits)
        plan = make_plan(model, config)
        quantized = sum(entry.parameters for entry in plan.entries if entry.quantized)
        packed = sum(entry.packed_bytes for entry in plan.entries)
        needed = packed + (parameters - quantized) * dtype.itemsize + cache
        fits = needed <= options.memory
        if fits:
            best, spare = bits, options.memory - needed
        print(
            f"{bits:>4}  {config.codebook:<10} {plan.true_bits:>10.3f}  {shown(needed - cache):>12}  {shown(needed):>12}  "
            f"{'fits' if fits else 'too large'}"
        )
    if best is None:
        raise SystemExit(f"nothing fits into {shown(options.memory)}: take a smaller model or context")
    # the remaining memory goes into more bits for some of the modules
    average = min(best + math.floor(10 * spare * 8 / quantized) / 10, BITS[-1])
    print(f"choose: QuipConfig(bits={average:g})")


if __name__ == "__main__":
    main(arguments())
