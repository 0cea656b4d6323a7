"""Quantize one model in several ways on the same text, and compare the gain of each part of the method.

    python examples/05_compare_methods.py FOLDER --text FILE [--num-samples 32] [--sequence-length 256]

FOLDER is a dense model with its tokenizer, FILE any text: its first part calibrates, its last part measures.

Output for a tiny model with random weights (its layers are so small that su and sv take almost one bit):

    method                         true bits  relative error  KL divergence  same top token
    nearest, no transforms             2.967          0.0724         0.2108           30.2%
    nearest, Hadamard                  2.967          0.0684         0.2779           30.6%
    LDLQ, no transforms                2.967          0.0265         0.0810           43.7%
    LDLQ, Hadamard                     2.967          0.0244         0.0801           55.6%
    LDLQ, Hadamard, 10 sweeps          2.967          0.0212         0.0653           61.1%
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from transformers_quip import QuipConfig
from transformers_quip.evaluation import divergence, true_bits_per_weight

METHODS = {
    "nearest, no transforms": {"rounding": "nearest", "incoherence": "none", "refinement_sweeps": 0},
    "nearest, Hadamard": {"rounding": "nearest", "refinement_sweeps": 0},
    "LDLQ, no transforms": {"incoherence": "none", "refinement_sweeps": 0},
    "LDLQ, Hadamard": {"refinement_sweeps": 0},
    "LDLQ, Hadamard, 10 sweeps": {"refinement_sweeps": 10},
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a dense model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--num-samples", type=int, default=32, help="windows to calibrate on, and to measure on")
    parser.add_argument("--sequence-length", type=int, default=256)
    return parser.parse_args()


def main(options: argparse.Namespace) -> None:
    dense = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    ids = tokenizer(options.text.read_text(encoding="utf-8"), return_tensors="pt", verbose=False)["input_ids"][0]
    length = options.sequence_length
    windows = ids[: len(ids) // length * length].view(-1, length)
    count = min(options.num_samples, len(windows) // 2)
    if count < 1:
        raise SystemExit(f"{options.text} has {len(ids)} tokens, but two windows of {length} are needed")

    print(f"{'method':<30} true bits  relative error  KL divergence  same top token")
    for name, chosen in METHODS.items():
        config = QuipConfig(dataset=windows[:count], num_samples=count, sequence_length=length, **chosen)
        model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32, quantization_config=config)
        away = divergence(model.eval(), dense, windows[-count:])
        error = model.config.quantization_config.calibration["mean_relative_error"]
        print(
            f"{name:<30} {true_bits_per_weight(model):>9.3f}  {error:>14.4f}  {away.mean:>13.4f}  "
            f"{away.top1_agreement:>14.1%}"
        )


if __name__ == "__main__":
    main(arguments())
