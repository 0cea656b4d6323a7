"""One-sided against two-sided rounding: the KL divergence to the dense model, and what it costs.

    python benchmarks/two_sided.py [FOLDER] [--blocks 10] [--windows 64] [--sketches outputs A B] [--codebook e8p]
        [--sweeps 0] [--dampings 0.01 0.1 0.4 1.5]

The first blocks of the model are quantized, the others stay dense; each way in turn, with the same Wikipedia windows for
the Hessians and for the gradients. The divergence is the mean over 8 windows of each text that none of them has seen. CPU
seconds count all threads, and the gradients. --dampings measures dampings of the output-side Hessian with the first sketch,
whose gradients are then computed once.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import machine
import torch
from protocol import load_windows
from transformers import AutoModelForCausalLM, AutoTokenizer

from transformers_quip import QuipConfig
from transformers_quip.calibration import find_blocks
from transformers_quip.evaluation import divergence
from transformers_quip.quantize import hessian, recipe
from transformers_quip.quantize.recipe import quantize_model

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
from smollm2 import dense_folder

HELD_OUT = 8


def compute_gradients_once() -> None:
    """Let every run of this process use the gradients of the first."""
    gradients, kept = recipe.curvature_of, {}

    def once(*arguments):
        if not kept:
            kept.update(gradients(*arguments))
        return dict(kept)  # quantizing takes out what it has used

    recipe.curvature_of = once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="a dense model; SmolLM2 by default")
    parser.add_argument("--blocks", type=int, default=10)
    parser.add_argument("--windows", type=int, default=64, help="sequences of 512 tokens")
    parser.add_argument("--sketches", nargs="+", default=["outputs", "A", "B"])
    parser.add_argument("--codebook", default="e8p")
    parser.add_argument("--sweeps", type=int, default=0)
    parser.add_argument("--dampings", type=float, nargs="*", default=[])
    options = parser.parse_args()
    folder = options.folder or dense_folder()
    windows = load_windows(AutoTokenizer.from_pretrained(folder), calibration=options.windows, evaluation=HELD_OUT)
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    name, blocks = find_blocks(dense)
    rows = []
    if options.dampings:
        compute_gradients_once()
        ways = [(None, None), *((options.sketches[0], damping) for damping in options.dampings)]
    else:
        ways = [(sketch, hessian.OUTPUT_DAMPING if sketch else None) for sketch in (None, *options.sketches)]
    for sketch, damping in ways:
        hessian.OUTPUT_DAMPING = damping
        config = QuipConfig(
            codebook=options.codebook,
            rounding="yaqa" if sketch else "ldlq",
            sketch=sketch or "outputs",
            sketch_samples=options.windows,
            dataset=windows.calibration,
            num_samples=options.windows,
            refinement_sweeps=options.sweeps,
            modules_to_not_convert=[rf"{name}\.{index}\..*" for index in range(options.blocks, len(blocks))],
        )
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        begin = time.process_time()
        quantize_model(model, config)
        seconds = time.process_time() - begin
        row = {
            "rounding": config.rounding,
            "sketch": sketch,
            "damping": damping,
            "divergence": {key: divergence(model, dense, ids).mean for key, ids in windows.evaluation.items()},
            "cpu_seconds": seconds,
        }
        print(row, flush=True)
        rows.append(row)
    arguments = {key: getattr(options, key) for key in ("blocks", "windows", "codebook", "sweeps")}
    machine.save("two_sided", {"model": folder.name, "arguments": arguments, "rows": rows})


if __name__ == "__main__":
    main()
