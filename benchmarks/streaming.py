"""Quantize a model from folder to folder under a memory limit, in memory, and in several processes: time, memory, the plan.

    python benchmarks/streaming.py WORK [--blocks 32] [--hidden 2560] [--limit 4e9] [--cgroup FOLDER] [--samples 8]
        [--sweeps 0]
    python benchmarks/streaming.py WORK --model FOLDER --ways stream memory processes2 --limit 0 --samples 256 --tokens 512

Without --model a Llama with random weights is written to WORK/dense, one file for each block. Each way runs in a fresh
process (or in two or four, with one thread each) and writes to WORK/<way>. With a limit it may not have more private memory
(RLIMIT_DATA: the system refuses more), or with --cgroup, an empty folder of a memory controller (version 1 or 2), not more
memory of any kind: the system ends a process that needs more. Peaks are those of anonymous memory (RssAnon) and of all of
it (VmHWM), which includes pages of mapped files. The results of all ways must have the same bytes. WORK is removed
afterwards.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
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
NORMS = ("input", "post_attention")
WAYS = ("stream", "memory", "resumed", "processes2", "processes4")
ARGUMENTS = ("hidden", "intermediate", "blocks", "samples", "tokens", "batch_size", "sweeps", "limit")


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


def child(options: argparse.Namespace) -> None:
    """Quantize in one way, and print the peaks and the stages as JSON."""
    import transformers_quip
    from transformers_quip import QuipConfig
    from transformers_quip.calibration import processes

    if options.cgroup:
        (options.cgroup / "cgroup.procs").write_text(str(os.getpid()))
    elif options.limit:
        resource.setrlimit(resource.RLIMIT_DATA, (int(options.limit), int(options.limit)))
    sizes = {"num_samples": options.samples, "sequence_length": options.tokens, "batch_size": options.batch_size}
    config = QuipConfig(bits=2, dataset=_ids(options), refinement_sweeps=options.sweeps, **sizes)
    watch = AnonymousPeak()
    watch.start()
    started = time.perf_counter()
    dense, out = options.model or options.work / "dense", options.work / options.way
    if options.way == "memory":
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
        model.save_pretrained(out)
    else:
        model = transformers_quip.quantize(dense, out, config, fresh=options.way != "resumed")
    seconds = time.perf_counter() - started
    watch.stopped.set()
    watch.join()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    stages = model.hf_quantizer.report.seconds
    highest = int(status["VmHWM"].split()[0]) * 1024
    if processes.is_first():
        print(json.dumps({"anonymous": watch.peak, "resident": highest, "seconds": seconds, "stages": dict(stages)}))


def limit_group(folder: Path, limit: int) -> None:
    """Give a memory controller's folder its limit in bytes, without swap."""
    version_1 = folder / "memory.limit_in_bytes"
    (version_1 if version_1.exists() else folder / "memory.max").write_text(str(limit))


def _ids(options: argparse.Namespace) -> torch.Tensor:
    """Random token ids for a random model; for a real one Wikipedia text."""
    if options.model:
        from protocol import load_windows
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(options.model)
        return load_windows(tokenizer, calibration=options.samples, evaluation=1, length=options.tokens).calibration
    return torch.randint(VOCABULARY, (options.samples, options.tokens), generator=torch.Generator().manual_seed(1))


def run(way: str, options: argparse.Namespace) -> dict:
    """One way in a fresh process, with one thread."""
    command = [sys.executable]
    if way.startswith("processes"):
        where = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
        command += ["-m", "torch.distributed.run", "--nproc-per-node", way.removeprefix("processes"), *where]
    variables = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command += [__file__, *sys.argv[1:], "--way", way]
    stopped = kill_in_the_middle(command, variables, options.work / way) if way == "resumed" else {}
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{way} did not finish:\n{done.stderr[-3000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    said = re.search(r"Memory: about ([\d.]+ .?B) .*Time: about (.+?) \(", done.stderr)
    if said:
        found["predicted"] = {"memory": said[1], "time": said[2]}
    return {**found, **stopped}


def kill_in_the_middle(command: list[str], variables: dict[str, str], out: Path) -> dict:
    """Kill a run when half of its blocks are finished; returns the stages until then, as its state has them."""
    state, wanted = out / ".quantizing" / "state.json", None
    with (out.parent / "killed.log").open("w") as log:
        process = subprocess.Popen(command, env=os.environ | variables, stdout=log, stderr=log)
        while process.poll() is None:
            time.sleep(0.02)
            if not state.is_file():
                continue
            found = json.loads(state.read_text())
            wanted = wanted or max(len(list((out.parent / "dense").glob("block-*"))) // 2, 1)
            if len(found["finished"]) >= wanted:
                process.kill()
                process.wait()
                return {"killed_after": len(found["finished"]), "stages_before": found["seconds"]}
    sys.exit(f"the run ended before it was killed:\n{(out.parent / 'killed.log').read_text()[-2000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="a new folder, which is removed afterwards")
    parser.add_argument("--model", type=Path, help="a dense model instead of a random one")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["stream"])
    parser.add_argument("--hidden", type=int, default=2560)
    parser.add_argument("--intermediate", type=int, default=6912)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--samples", type=int, default=8, help="calibration sequences")
    parser.add_argument("--tokens", type=int, default=256, help="tokens in each of them")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--sweeps", type=int, help="refinement sweeps, if not the default")
    parser.add_argument("--limit", type=float, default=4e9, help="bytes of private memory; 0: no limit")
    parser.add_argument("--cgroup", type=Path, help="the limit is of this group, for memory of every kind")
    parser.add_argument("--name", default="streaming", help="of the file of results")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)  # the child's
    options = parser.parse_args()
    if options.way:
        child(options)
        return
    if options.cgroup:
        limit_group(options.cgroup, int(options.limit))
    options.work.mkdir(parents=True)
    parameters = None
    if not options.model:
        parameters = write_dense(options.work / "dense", options.hidden, options.blocks, options.intermediate)
    result = {
        "model": options.model.name if options.model else "random Llama",
        "parameters": parameters,
        "arguments": {key: getattr(options, key) for key in ARGUMENTS},
        "ways": {way: run(way, options) for way in options.ways},
        "quantized_bytes": sum(path.stat().st_size for path in _weights(options.work / options.ways[0])),
    }
    for way in options.ways[1:]:
        if _bytes(options.work / way) != _bytes(options.work / options.ways[0]):
            sys.exit(f"{way} and {options.ways[0]} made different models")
    shutil.rmtree(options.work)
    print(json.dumps(result, indent=1))
    machine.save(options.name, result)


def _weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _bytes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in _weights(folder)}


if __name__ == "__main__":
    main()
