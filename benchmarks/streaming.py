"""Quantize a model that is larger than a memory limit, from folder to folder: time, memory, and what the plan said.

    python benchmarks/streaming.py FOLDER [--blocks 20] [--hidden 2560] [--limit 4e9] [--samples 8]

A Llama with random weights is written to FOLDER/dense, one file for each block, and quantized into FOLDER/quantized by a
child process that may not have more private memory than the limit (RLIMIT_DATA: the system refuses more). Peaks are those
of anonymous memory (RssAnon) and of all of it (VmHWM), which includes pages of mapped files.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import machine
import torch
from memory import AnonymousPeak
from safetensors.torch import save_file
from transformers import LlamaConfig

VOCABULARY = 32000


def write_dense(folder: Path, hidden: int, blocks: int, intermediate: int) -> int:
    """Write a Llama with random weights in bfloat16, block by block; returns its number of parameters."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 128 or 1,
        num_key_value_heads=max(hidden // 512, 1),
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    narrow = config.num_key_value_heads * config.head_dim

    def weight(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) / columns**0.5).to(torch.bfloat16)

    places, total = {}, 0

    def save(name: str, tensors: dict[str, torch.Tensor]) -> None:
        nonlocal total
        save_file(tensors, folder / name, {"format": "pt"})
        places.update(dict.fromkeys(tensors, name))
        total += sum(tensor.numel() for tensor in tensors.values())

    for block in range(blocks):
        prefix = f"model.layers.{block}"
        tensors = {f"{prefix}.{norm}_layernorm.weight": torch.ones(hidden, dtype=torch.bfloat16) for norm in NORMS}
        for name, (rows, columns) in {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (narrow, hidden),
            "self_attn.v_proj": (narrow, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (intermediate, hidden),
            "mlp.up_proj": (intermediate, hidden),
            "mlp.down_proj": (hidden, intermediate),
        }.items():
            tensors[f"{prefix}.{name}.weight"] = weight(rows, columns)
        save(f"block-{block:05d}.safetensors", tensors)
    ends = {"model.embed_tokens.weight": weight(VOCABULARY, hidden), "lm_head.weight": weight(VOCABULARY, hidden)}
    save("ends.safetensors", {**ends, "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16)})
    index = {"metadata": {"total_size": 2 * total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


NORMS = ("input", "post_attention")


def child(options: argparse.Namespace) -> None:
    """Quantize under the limit, and print the peaks and the stages as JSON."""
    import transformers_quip
    from transformers_quip import QuipConfig

    if options.limit:
        resource.setrlimit(resource.RLIMIT_DATA, (int(options.limit), int(options.limit)))
    ids = torch.randint(VOCABULARY, (options.samples, options.tokens), generator=torch.Generator().manual_seed(1))
    config = QuipConfig(bits=2, dataset=ids, num_samples=options.samples, sequence_length=options.tokens, batch_size=2)
    watch = AnonymousPeak()
    watch.start()
    started = time.perf_counter()
    model = transformers_quip.quantize(options.folder / "dense", options.folder / "quantized", config, fresh=True)
    seconds = time.perf_counter() - started
    watch.stopped.set()
    watch.join()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    stages = model.hf_quantizer.report.seconds
    highest = int(status["VmHWM"].split()[0]) * 1024
    print(json.dumps({"anonymous": watch.peak, "resident": highest, "seconds": seconds, "stages": dict(stages)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="an empty or new folder, which is emptied afterwards")
    parser.add_argument("--hidden", type=int, default=2560)
    parser.add_argument("--intermediate", type=int, default=6912)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--samples", type=int, default=8, help="calibration sequences")
    parser.add_argument("--tokens", type=int, default=256, help="tokens in each of them")
    parser.add_argument("--limit", type=float, default=4e9, help="bytes of private memory; 0: no limit")
    parser.add_argument("--name", default="streaming", help="of the file of results")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    parameters = write_dense(options.folder / "dense", options.hidden, options.blocks, options.intermediate)
    run = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--child"], capture_output=True, text=True, check=False)
    if run.returncode:
        sys.exit(f"the run did not finish:\n{run.stderr[-3000:]}")
    found = json.loads(run.stdout.splitlines()[-1])
    said = re.search(r"Memory: about ([\d.]+ .?B) .*Time: about (.+?) \(", run.stderr)
    size = sum(path.stat().st_size for path in (options.folder / "quantized").glob("*.safetensors"))
    shutil.rmtree(options.folder)
    result = {
        "parameters": parameters,
        "shape": {key: getattr(options, key) for key in ("hidden", "intermediate", "blocks", "samples", "tokens", "limit")},
        "dense_bytes": 2 * parameters,
        "quantized_bytes": size,
        "predicted": {"memory": said[1], "time": said[2]} if said else None,
        **found,
    }
    print(json.dumps(result, indent=1))
    machine.save(options.name, result)


if __name__ == "__main__":
    main()
