"""Quantize a model to 2 bits while loading it, compare perplexities, save it, and load it again in a fresh process.

    python examples/01_quantize_on_load.py FOLDER [--dataset self|none|FILE] [--num-samples N] [--text FILE] ...

FOLDER is any causal language model in Transformers' format. Perplexity is measured on a text file, or on the news
in the package gensim, so nothing here needs the network. `make demo` runs this file on SmolLM2-135M-Instruct,
which smollm2.py makes.

Output, without progress bars, on 2 cores of an AMD EPYC restricted to AVX2 (6.7 minutes, one beside other work):

    perplexity before: 16.7 s
    LlamaForCausalLM: 210 of 211 linear layers, 78.9% of 134.5M parameters, are quantized to 2.092 bits per weight ...
    Calibrating on self: 38 x 512 tokens written by the model itself, seed 0.
    KL divergence to the dense model on held-out windows: 0.9932 before, 0.7276 after ...
    quantize to 2 bits: 354.2 s
    perplexity after: 10.8 s
      33.06 -> 93.40  (8 windows of 512 tokens)
      tuned: 254016 numbers in 16 steps; KL divergence to the dense model on held-out text: 0.993 -> 0.728
    load it in a fresh process: 9.3 s
      logits of the reloaded model: identical
      it writes: 'The three most important inventions of the last century are: 1. The invention of a new ...'
    size on disk: 538.1 MB -> 141.2 MB
    true bits per weight of the quantized linears: 2.092

An earlier run with 64 sequences, 10 sweeps and 2 epochs took twice as long: 33.06 -> 79.98.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from transformers_quip import QuipConfig
from transformers_quip.evaluation import perplexity, safetensors_bytes, true_bits_per_weight

PROMPT = "The three most important inventions of the last century are"
WINDOW = 512  # tokens


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a dense model")
    parser.add_argument("--output", type=Path, help="where to save; next to FOLDER by default")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--dataset", default="self", help="calibration data: self, none, or a text file")
    parser.add_argument("--num-samples", type=int, default=32, help="calibration sequences (more is better, slower)")
    parser.add_argument("--sequence-length", type=int, default=512, help="tokens in each of them")
    parser.add_argument(
        "--sweeps", type=int, default=2, help="passes over the codes after rounding; the package's default is 10"
    )
    parser.add_argument(
        "--tune", type=float, default=1, metavar="EPOCHS", help="train su, sv and norms after rounding; 0: no"
    )
    parser.add_argument("--text", type=Path, help="for the perplexity; gensim's news by default")
    parser.add_argument("--windows", type=int, default=8, help="windows of 512 tokens for the perplexity")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reload", type=Path, metavar="PROBE", help=argparse.SUPPRESS)  # the fresh process
    return parser.parse_args()


def main(options: argparse.Namespace) -> None:
    folder = options.folder
    output = options.output or folder.with_name(f"{folder.name}-quip-{options.bits}bit")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = (options.text or news_file()).read_text(encoding="utf-8")
    windows = cut(tokenizer, text)[: options.windows]

    model = timed("load the dense model", AutoModelForCausalLM.from_pretrained, folder, dtype=torch.float32)
    before = timed("perplexity before", perplexity, model, windows)
    del model

    if options.dataset == "self":
        dataset = "self"
    else:
        dataset = None if options.dataset == "none" else [Path(options.dataset).read_text(encoding="utf-8")]
    # su, sv and the norms learn the dense model's predictions on the same text; 6 more sequences decide about the result
    tune = (
        {"epochs": options.tune, "held_out": 6, "batch_size": 2, "looks": 1}
        if options.tune and dataset is not None
        else "none"
    )
    config = QuipConfig(
        bits=options.bits,
        dataset=dataset,
        num_samples=options.num_samples,
        sequence_length=options.sequence_length,
        refinement_sweeps=options.sweeps,
        tune=tune,
        seed=options.seed,
    )
    model = timed(
        f"quantize to {options.bits} bits",
        AutoModelForCausalLM.from_pretrained,
        folder,
        dtype=torch.float32,
        quantization_config=config,
    )
    after = timed("perplexity after", perplexity, model, windows)
    print(f"  {before:.2f} -> {after:.2f}  ({len(windows)} windows of {WINDOW} tokens)")
    tuning = model.hf_quantizer.report.tuning if dataset is not None else None
    if tuning:
        print(
            f"  tuned: {tuning['trained']} numbers in {tuning['steps']} steps; KL divergence to the dense model on "
            f"held-out text: {tuning['held_out_before']:.3f} -> {tuning['held_out_after']:.3f}"
        )

    timed("save", model.save_pretrained, output)
    tokenizer.save_pretrained(output)

    probe = {"ids": windows[:1].contiguous()}
    with torch.no_grad():
        probe["logits"] = model(probe["ids"]).logits.contiguous()
    probe_file = output / "probe.safetensors"
    save_file(probe, probe_file)
    try:
        reply = timed("load it in a fresh process", fresh_process, output, probe_file)
    finally:
        probe_file.unlink()
    if not reply["same_logits"]:
        raise SystemExit("the reloaded model's logits differ from the saved model's")
    print("  logits of the reloaded model: identical")
    print(f"  it writes: {reply['text']!r}")

    print(f"size on disk: {safetensors_bytes(folder) / 1e6:.1f} MB -> {safetensors_bytes(output) / 1e6:.1f} MB")
    print(f"true bits per weight of the quantized linears: {true_bits_per_weight(model):.3f}")
    print(f"saved in {output}")


def timed(what: str, function, *args, **kwargs):
    """Call the function and print how long it took."""
    print(f"{what} ...", flush=True)
    start = time.perf_counter()
    result = function(*args, **kwargs)
    print(f"{what}: {time.perf_counter() - start:.1f} s", flush=True)
    return result


def news_file() -> Path:
    """A file of news that comes with gensim."""
    import gensim

    return Path(gensim.__file__).parent / "test/test_data/lee_background.cor"


def cut(tokenizer, text: str) -> torch.Tensor:
    """The text as windows of token ids, int64 [number of windows, WINDOW]; the rest at the end is dropped."""
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    return ids[: len(ids) - len(ids) % WINDOW].view(-1, WINDOW)


def fresh_process(folder: Path, probe: Path) -> dict:
    """Run this file again with --reload and return its findings."""
    command = [sys.executable, __file__, str(folder), "--reload", str(probe)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def reload(folder: Path, probe_file: Path) -> None:
    """In the fresh process: load the saved model, compare its logits with the saved ones, and write a sentence."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    probe = load_file(probe_file)
    with torch.no_grad():
        same = torch.equal(model(probe["ids"]).logits, probe["logits"])
    prompt = tokenizer(PROMPT, return_tensors="pt")
    # a small model at 2 bits repeats itself in greedy text, as the dense one does
    written = model.generate(**prompt, max_new_tokens=48, do_sample=False, repetition_penalty=1.3)
    text = tokenizer.decode(written[0], skip_special_tokens=True)
    print(json.dumps({"same_logits": same, "text": text}))


if __name__ == "__main__":
    options = arguments()
    if options.reload:
        reload(options.folder, options.reload)
    else:
        main(options)
