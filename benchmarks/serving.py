"""Throughput of a quantized model in vLLM: many requests at once, one, and the same prompts in Transformers one by one.

    make test-vllm   # makes .venv-vllm
    .venv-vllm/bin/python benchmarks/serving.py FOLDER [--dense FOLDER] [--requests 8] [--tokens 64]

Each way is a fresh process, which warms up with short answers. Prompts are 16 random tokens, answers have one length.
`plugin` is the time that vLLM's entry point takes in a process that has imported vLLM, three times.
Everything is written to results/serving.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import machine
from markdown_tables import load, machine_line, table

PROMPT = 16
PLUGIN_RUNS = 3


def prompts(count: int, vocabulary: int) -> list[list[int]]:
    import torch

    ids = torch.randint(10, vocabulary, (count, PROMPT), generator=torch.Generator().manual_seed(0))
    return ids.tolist()


def in_vllm(options: argparse.Namespace) -> dict:
    """Seconds of all requests at once."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        options.folder, dtype=options.dtype, max_model_len=512, max_num_seqs=options.requests, kv_cache_memory_bytes=1 << 30
    )
    given = prompts(options.requests, llm.llm_engine.model_config.get_vocab_size())

    def seconds(ids: list[list[int]], tokens: int) -> float:
        params = SamplingParams(temperature=0, max_tokens=tokens, min_tokens=tokens, ignore_eos=True)
        begin = time.perf_counter()
        llm.generate([{"prompt_token_ids": one} for one in ids], params, use_tqdm=False)
        return time.perf_counter() - begin

    seconds(given, 4)
    return {"seconds": seconds(given, options.tokens)}


def in_transformers(options: argparse.Namespace) -> dict:
    """Seconds of the same requests, one after the other."""
    import torch
    from transformers import AutoModelForCausalLM

    import transformers_quip  # noqa: F401 - registers the method

    model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=getattr(torch, options.dtype)).eval()

    def seconds(ids: list[list[int]], tokens: int) -> float:
        begin = time.perf_counter()
        for one in ids:
            x = torch.tensor([one])
            model.generate(
                x, attention_mask=torch.ones_like(x), do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens
            )
        return time.perf_counter() - begin

    given = prompts(options.requests, model.config.vocab_size)
    seconds(given[:1], 4)
    return {"seconds": seconds(given, options.tokens)}


def plugin(options: argparse.Namespace) -> dict:
    """Seconds that vLLM waits for the plugin."""
    import vllm
    from vllm import LLM  # noqa: F401 - imported by every process before plugins are

    begin = time.perf_counter()
    from transformers_quip.vllm import register

    register()
    return {"seconds": time.perf_counter() - begin, "vllm": vllm.__version__}


def shown() -> str:
    """The table of docs/serving.md."""
    content = load("serving")
    if content is None:
        return "Not measured yet: `benchmarks/serving.py` makes these figures.\n"
    plugins = [row for row in content["rows"] if row["way"] == "plugin"]
    (version,) = {row["vllm"] for row in plugins}
    seconds = statistics.median(row["seconds"] for row in plugins)
    names = {"vllm": f"vLLM {version}, all at once", "transformers": "`generate()`, one after the other"}
    lines = [
        [names[row["way"]], row["model"], str(row["requests"]), f"{row['tokens_per_second']:.1f}"]
        for row in content["rows"]
        if row["way"] in names
    ]
    titles = ["program", f"SmolLM2-135M-Instruct, {content['dtype']}", "requests", "tokens per second, together"]
    imported = f"\nImporting the plugin takes {seconds:.2f} s in each process of vLLM (median of {len(plugins)}).\n"
    return table(titles, lines) + imported + machine_line(content)


WAYS = {"vllm": in_vllm, "transformers": in_transformers, "plugin": plugin}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a quantized model")
    parser.add_argument("--dense", help="the dense model")
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--way", choices=list(WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        options.out.write_text(json.dumps(WAYS[options.way](options)))
        return
    environment = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    # the first import of an editable installation writes the bytecode, which pip does for a wheel
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    subprocess.run([sys.executable, "-c", "import transformers_quip.vllm.config"], check=True, env=environment)
    runs = [("plugin", options.folder, 1)] * PLUGIN_RUNS
    runs += [("vllm", options.folder, options.requests), ("vllm", options.folder, 1)]
    runs += [("transformers", options.folder, options.requests)]
    runs += [("vllm", options.dense, options.requests), ("vllm", options.dense, 1)] if options.dense else []
    rows = []
    out = Path(tempfile.mkdtemp()) / "run.json"
    for way, folder, requests in runs:
        command = [sys.executable, __file__, folder, "--way", way, "--out", str(out), "--requests", str(requests)]
        command += ["--tokens", str(options.tokens), "--dtype", options.dtype]
        subprocess.run(command, check=True, env=environment)
        row = {"way": way, "model": "dense" if folder == options.dense else "quantized", "requests": requests}
        row |= json.loads(out.read_text())
        if way != "plugin":
            row["tokens_per_second"] = requests * options.tokens / row["seconds"]
        rows.append(row)
        print(json.dumps(row), flush=True)
    shutil.rmtree(out.parent)
    machine.save("serving", {"tokens": options.tokens, "dtype": options.dtype, "rows": rows})


if __name__ == "__main__":
    main()
