"""The cost of 8-bit activations: perplexity of one quantized model with both kinds, by the protocol in protocol.py.

    python benchmarks/activations.py QUANTIZED_FOLDER [--windows N]

QUANTIZED_FOLDER is a saved quantized model with its tokenizer. Once every token goes through the kernels of generation,
in float32, even if a matrix product would be faster; and once through the kernels of prompts, in bfloat16.
"""

from __future__ import annotations

import argparse

import machine
import torch
from protocol import EVALUATION_WINDOWS, load_windows
from transformers import AutoModelForCausalLM, AutoTokenizer

import transformers_quip
from quip_kernels import cpu_many as many_kernels
from transformers_quip.evaluation import perplexity
from transformers_quip.ops.cpu import route


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--windows", type=int, default=EVALUATION_WINDOWS, help="evaluation windows of each text")
    options = parser.parse_args()
    transformers_quip.set_backend("cpu")  # raises if the compiled library is missing

    windows = load_windows(AutoTokenizer.from_pretrained(options.folder), calibration=1, evaluation=options.windows)
    usual = route.MOST_VECTORS["e8p"]
    rows = []
    for kernels, dtype, most in (
        ("of generation", torch.float32, dict.fromkeys(usual, 1 << 30)),
        ("of prompts", torch.bfloat16, usual),
    ):
        route.MOST_VECTORS["e8p"] = most
        model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=dtype)
        found: dict[str, dict[str, float]] = {}
        for activations in ("exact", "int8"):
            transformers_quip.set_activations(activations)
            found[activations] = {name: perplexity(model, ids) for name, ids in windows.evaluation.items()}
        cost = {name: found["int8"][name] / value - 1 for name, value in found["exact"].items()}
        for name, value in cost.items():
            print(
                f"kernels {kernels}, {name}: exact {found['exact'][name]:.3f}, int8 {found['int8'][name]:.3f}, {value:+.3%}"
            )
        rows.append({"kernels": kernels, "dtype": str(dtype).removeprefix("torch."), "perplexity": found, "cost": cost})
    many = many_kernels.is_available()
    machine.save("activations", {"windows": options.windows, "prompts_multiply_int8": many, "rows": rows})


if __name__ == "__main__":
    main()
