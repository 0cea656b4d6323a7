"""Load a checkpoint of another package of this family (QuIP#, QuIP-for-all, QTIP, EXL3), and save it as a native one.

    python examples/03_load_community_checkpoint.py MODEL OUT

MODEL is a folder, or an id on the Hub. Nothing is quantized again: the codes are re-packed while they are read, so that the
native copy computes the same numbers.

Output for a tiny QuIP# checkpoint:

    qs_E8P12_t128: 8 quantized layers, 2.333 true bits per weight
    saved in native: 0.3 MB
    logits of the native copy: identical
    it has no tokenizer, so it writes nothing
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import transformers_quip  # noqa: F401 - makes Transformers understand these checkpoints
from transformers_quip.evaluation import linear_sizes, safetensors_bytes, true_bits_per_weight

PROMPT = "The three most important inventions of the last century are"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a quantized checkpoint: folder, or id on the Hub")
    parser.add_argument("out", type=Path, help="where to save the native copy")
    return parser.parse_args()


def main(options: argparse.Namespace) -> None:
    model = AutoModelForCausalLM.from_pretrained(options.model).eval()
    bits = true_bits_per_weight(model)
    print(f"{Path(options.model).name}: {len(linear_sizes(model))} quantized layers, {bits:.3f} true bits per weight")

    model.save_pretrained(options.out)
    print(f"saved in {options.out.name}: {safetensors_bytes(options.out) / 1e6:.1f} MB")

    native = AutoModelForCausalLM.from_pretrained(options.out).eval()
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        if not torch.equal(native(ids).logits, model(ids).logits):
            raise SystemExit("the native copy computes something else")
    print("logits of the native copy: identical")

    try:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
    except (OSError, ValueError):
        print("it has no tokenizer, so it writes nothing")
        return
    written = native.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=24, do_sample=False)
    print(f"it writes: {tokenizer.decode(written[0], skip_special_tokens=True)!r}")
    tokenizer.save_pretrained(options.out)


if __name__ == "__main__":
    main(arguments())
