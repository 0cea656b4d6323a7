"""CPU seconds for rounding one decoder block of a model: transforms, scale, LDLQ and refinement sweeps.

    python benchmarks/rounding.py [FOLDER] [--blocks 0 14 29] [--windows N]

The Hessians come from the dense model on a few calibration windows; the time of rounding hardly depends on them.
CPU seconds count all threads.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import machine
import torch
from protocol import load_windows
from transformers import AutoModelForCausalLM, AutoTokenizer

from transformers_quip import QuipConfig
from transformers_quip.calibration import find_blocks
from transformers_quip.evaluation import mean_by_kind
from transformers_quip.quantize.layer import quantize_weights

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
from smollm2 import dense_folder


def inputs_of_linears(model, block, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return {name of a linear in `block`: its inputs [tokens, n]} for one forward pass over ids."""
    inputs: dict[str, torch.Tensor] = {}

    def remember(name):
        def hook(module, args):
            inputs[name] = args[0].flatten(0, -2)

        return hook

    linears = {name: module for name, module in block.named_modules() if isinstance(module, torch.nn.Linear)}
    handles = [module.register_forward_pre_hook(remember(name)) for name, module in linears.items()]
    try:
        with torch.no_grad():
            model(ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return inputs


def sharing_inputs(inputs: dict[str, torch.Tensor]) -> list[list[str]]:
    """Group the names whose inputs are the same tensor."""
    groups: dict[int, list[str]] = {}
    for name, x in inputs.items():
        groups.setdefault(x.data_ptr(), []).append(name)
    return list(groups.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="a dense model; SmolLM2 by default")
    parser.add_argument("--blocks", type=int, nargs="+", default=[0, 14, 29])
    parser.add_argument("--windows", type=int, default=8, help="calibration windows of 512 tokens")
    options = parser.parse_args()

    folder = options.folder or dense_folder()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = load_windows(AutoTokenizer.from_pretrained(folder), calibration=options.windows, evaluation=1).calibration
    config = QuipConfig(bits=2, dataset=ids)
    _, blocks = find_blocks(model)

    rows = []
    print(f"{'block':>5s} {'CPU s':>8s} {'wall s':>8s}   relative proxy loss")
    for index in options.blocks:
        inputs = inputs_of_linears(model, blocks[index], ids)
        records = []
        cpu_seconds = wall_seconds = 0.0
        for names in sharing_inputs(inputs):
            x = inputs[names[0]]
            hessian = x.T @ x / len(x)
            weights = {name: blocks[index].get_submodule(name).weight.detach() for name in names}
            cpu, wall = time.process_time(), time.perf_counter()
            quantized = quantize_weights(weights, hessian, config)
            cpu_seconds += time.process_time() - cpu
            wall_seconds += time.perf_counter() - wall
            records += [{"name": name, **result.statistics} for name, result in quantized.items()]
        losses = mean_by_kind(records)
        shown = ", ".join(f"{kind} {loss:.4f}" for kind, loss in losses.items())
        print(f"{index:5d} {cpu_seconds:8.2f} {wall_seconds:8.2f}   {shown}")
        rows.append({"block": index, "cpu_seconds": cpu_seconds, "wall_seconds": wall_seconds, "proxy_loss": losses})
    median = statistics.median(row["cpu_seconds"] for row in rows)
    print(f"median: {median:.2f} CPU seconds a block, {config.sweeps} sweeps")
    machine.save("rounding", {"refinement_sweeps": config.sweeps, "cpu_seconds": median, "rows": rows})


if __name__ == "__main__":
    main()
