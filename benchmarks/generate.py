"""Generation and prefill on the CPU: 2-bit models against the dense bfloat16 models, in turns within one run.

    python benchmarks/generate.py FOLDER [--repeats N] [--threads N] [--activations exact int8] [--models NAME ...]
                                  [--kinds generate prefill] [--tokens N] [--shared] [--busy N]

FOLDER holds the dense model; it is quantized without calibration, which changes its text but not its speed. A second
model is a Llama with random weights, hidden size 2048 and 8 layers. Batch 1, 64 greedy tokens after a prompt of 16; prefill
is one forward pass over 512 tokens. Medians of whole calls are compared. With --shared, for a machine that others use too,
CPU time of one thread is measured. --busy: that many other processes compute all the time. Rows of results/generate.json
with other numbers of threads and of busy processes are kept. QUIP_KERNELS_CPU_LEVEL=avx2 measures a processor without
AVX-512, except that PyTorch's dense model still uses all instructions that there are.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable

import machine
import torch
from markdown_tables import load
from transformers import AutoModelForCausalLM, LlamaConfig

import transformers_quip
from transformers_quip import QuipConfig
from transformers_quip.nn.replace import quantized_linears

NEW_TOKENS, PROMPT, PREFILL = 64, 16, 512
MODELS = ("SmolLM2-135M", "Llama 2048x8, random")


def compute() -> None:
    """Keep a processor busy."""
    for _ in itertools.count():
        pass


def save_random_llama(folder: str) -> None:
    """A Llama of the sizes of a 1B model, cut to 8 layers."""
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=8,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def ways_of(folder: str, activations: list[str], new_tokens: int) -> dict[str, dict[str, Callable[[], object]]]:
    """{"generate" or "prefill": {way: call}} for the dense model and the quantized one."""
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    config = QuipConfig(bits=2, dataset=None)
    packed = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config).eval()
    linears = quantized_linears(packed).values()
    resident = sum(p.untyped_storage().nbytes() for linear in linears for p in linear.parameters())
    stored = sum(linear.packed_bytes for linear in linears)
    print(f"{folder}: decoder linears take {resident / 2**20:.1f} MiB, {resident / stored:.3f} of their packed bytes")
    ids = torch.randint(3, dense.config.vocab_size, (1, PREFILL), generator=torch.Generator().manual_seed(0))
    # One model for each setting: after a change of the setting layers look up their kernels again, which users rarely do.
    models = {"dense bfloat16": (dense, None)} | {f"2-bit {name}": (copy.deepcopy(packed), name) for name in activations}
    ways: dict[str, dict[str, Callable[[], object]]] = {"generate": {}, "prefill": {}}
    for name, (model, precision) in models.items():

        def generate(model=model, precision=precision):
            transformers_quip.set_activations(precision or "exact")
            out = model.generate(ids[:, :PROMPT], max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)
            if out.shape[1] != PROMPT + new_tokens:
                raise SystemExit(f"{out.shape[1] - PROMPT} tokens were written, {new_tokens} were asked for")

        def prefill(model=model, precision=precision):
            transformers_quip.set_activations(precision or "exact")
            model(ids, logits_to_keep=1, use_cache=True)

        ways["generate"][name], ways["prefill"][name] = generate, prefill
    return ways


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="folder of the dense model")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--activations", nargs="+", default=["exact", "int8"])
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--kinds", nargs="+", default=["generate", "prefill"], choices=["generate", "prefill"])
    parser.add_argument("--tokens", type=int, default=NEW_TOKENS)
    parser.add_argument("--shared", action="store_true", help="CPU time of one thread")
    parser.add_argument("--busy", type=int, default=0, metavar="N", help="other processes that compute")
    options = parser.parse_args()
    if options.shared:
        options.threads = 1
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.shared else time.perf_counter
    others = [multiprocessing.get_context("spawn").Process(target=compute, daemon=True) for _ in range(options.busy)]
    for other in others:
        other.start()

    rows = []
    with tempfile.TemporaryDirectory() as random:
        for label in options.models:
            folder = options.folder if label == MODELS[0] else random
            if folder is random:
                save_random_llama(random)
            for kind, ways in ways_of(folder, options.activations, options.tokens).items():
                if kind not in options.kinds:
                    continue
                times: dict[str, list[float]] = {name: [] for name in ways}
                for repeat in range(options.repeats + 1):
                    for name, way in ways.items():
                        start = clock()
                        way()
                        if repeat:  # the first of each warms up
                            times[name].append(clock() - start)
                found = {name: statistics.median(taken) for name, taken in times.items()}
                for name, seconds in found.items():
                    tokens = options.tokens if kind == "generate" else PREFILL
                    rate, ratio = tokens / seconds, found["dense bfloat16"] / seconds
                    print(f"{label:22s} {kind:9s} {name:16s} {rate:9.1f} tokens/s {ratio:6.2f} x dense")
                    rows.append(
                        {
                            "model": label,
                            "kind": kind,
                            "way": name,
                            "tokens_per_second": tokens / seconds,
                            "times_dense": ratio,
                        }
                    )
    about = {"threads": options.threads, "busy": options.busy, "cpu_time": options.shared}
    before = (load(machine.named("generate")) or {"rows": []})["rows"]
    kept = [row for row in before if any(row[key] != value for key, value in about.items())]
    about |= {"repeats": options.repeats, "processor": machine.describe()["processor"]}
    machine.save("generate", {"rows": kept + [row | about for row in rows]})


if __name__ == "__main__":
    main()
