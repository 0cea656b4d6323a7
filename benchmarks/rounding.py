"""CPU seconds and losses of rounding one decoder block of a model: transforms, scale, LDLQ, refinement sweeps, refits.

    python benchmarks/rounding.py [FOLDER] [--blocks 0 14 29] [--windows N] [--codebooks NAME ...] [--sweeps N ...]
        [--refit N ...] [--name NAME]

The Hessians come from the dense model on a few calibration windows; the time of rounding hardly depends on them. "proxy
loss" is tr(E H Eᵀ) / tr(W H Wᵀ) with these, "fresh loss" the same with the Hessian of as many windows that rounding has not
seen. CPU seconds count all threads. The first combination is the one whose seconds docs/results.md shows.
"""

from __future__ import annotations

import argparse
import itertools
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
from transformers_quip.nn.replace import quantized_linear
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


def measure(weights: dict[str, torch.Tensor], seen: torch.Tensor, fresh: torch.Tensor, config: QuipConfig) -> list[dict]:
    """Round linears that read one input; a record for each, the first with the CPU seconds of all."""
    cpu = time.process_time()
    quantized = quantize_weights(weights, seen, config)
    seconds = time.process_time() - cpu
    records = []
    for name, result in quantized.items():
        rows, columns = weights[name].shape
        linear = torch.nn.utils.skip_init(torch.nn.Linear, columns, rows, bias=False)
        error = weights[name] - quantized_linear(linear, result, config).dequantize(torch.float32)
        lost, total = (((x @ fresh) * x).sum().item() for x in (error, weights[name]))
        records.append({"name": name, "fresh_loss": lost / total, **result.statistics})
    return [{"cpu_seconds": seconds, **records[0]}, *records[1:]]


def round_block(block: torch.nn.Module, inputs: list[dict[str, torch.Tensor]], config: QuipConfig) -> dict:
    """Round all linears of a block; its row of the results.

    Args:
        inputs: of each linear by its name: those that rounding sees, and others.
    """
    records = []
    for names in sharing_inputs(inputs[0]):
        hessians = [found[names[0]].T @ found[names[0]] / len(found[names[0]]) for found in inputs]
        weights = {name: block.get_submodule(name).weight.detach() for name in names}
        records += measure(weights, *hessians, config)
    seconds = sum(record.get("cpu_seconds", 0.0) for record in records)
    return {"cpu_seconds": seconds} | {key: mean_by_kind(records, key) for key in ("proxy_loss", "fresh_loss")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="a dense model; SmolLM2 by default")
    parser.add_argument("--blocks", type=int, nargs="+", default=[0, 14, 29])
    parser.add_argument("--windows", type=int, default=8, help="calibration windows of 512 tokens")
    parser.add_argument("--codebooks", nargs="+", default=["e8p"], help="the option codebook of QuipConfig")
    parser.add_argument("--sweeps", type=int, nargs="+", default=[None], help="the option refinement_sweeps")
    parser.add_argument("--refit", type=int, nargs="+", default=[0], help="the option refit")
    parser.add_argument("--name", default="rounding", help="of the file of results")
    options = parser.parse_args()

    folder = options.folder or dense_folder()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = load_windows(tokenizer, calibration=2 * options.windows, evaluation=1).calibration.split(options.windows)
    _, blocks = find_blocks(model)
    inputs = {index: [inputs_of_linears(model, blocks[index], part) for part in ids] for index in options.blocks}

    combinations = []
    for codebook, sweeps, refit in itertools.product(options.codebooks, options.sweeps, options.refit):
        config = QuipConfig(bits=2, codebook=codebook, refinement_sweeps=sweeps, refit=refit)
        print(f"{codebook}, {config.sweeps} sweeps, refit {refit}: block, CPU s, relative proxy loss / fresh loss")
        rows = []
        for index, both in inputs.items():
            row = {"block": index, **round_block(blocks[index], both, config)}
            losses = zip(row["proxy_loss"].items(), row["fresh_loss"].values(), strict=True)
            shown = ", ".join(f"{kind} {loss:.4f} / {fresh:.4f}" for (kind, loss), fresh in losses)
            print(f"{index:5d} {row['cpu_seconds']:8.2f}   {shown}")
            rows.append(row)
        found = {"codebook": codebook, "refinement_sweeps": config.sweeps, "refit": refit}
        found["cpu_seconds"] = statistics.median(row["cpu_seconds"] for row in rows)
        for key in ("proxy_loss", "fresh_loss"):
            found[key] = statistics.mean(statistics.mean(row[key].values()) for row in rows)
        print(f"  median {found['cpu_seconds']:.2f} CPU s, means {found['proxy_loss']:.5f} / {found['fresh_loss']:.5f}")
        combinations.append(found | {"rows": rows})
    first = {key: combinations[0][key] for key in ("refinement_sweeps", "cpu_seconds")}
    machine.save(options.name, {**first, "combinations": combinations})


if __name__ == "__main__":
    main()
