"""Waiting times before any computation: imports, `--help`, and `inspect` on the files of a large model.

    python benchmarks/startup.py [--runs N]

Every run is a new process. For a command, seconds are its wall time; for an import, the time of the
statement. Peak RSS is as the system counts it, in MB (10^6 bytes). Seconds are medians, peaks maxima. Transformers is
lazy: its code that loads models, and with it PyTorch, is imported when a model is first requested, and only then is the
same part of this package.
The large model has the shapes of a Llama of 70 billion parameters with 2-bit codes, without weights: its files have the
real headers, followed by a hole instead of data.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KEY_VALUE_HEADS, VOCABULARY = 8192, 28672, 80, 64, 8, 128256
SHARD = 5 * 10**9
# Modules that are loaded before this package is imported.
IMPORTS = {
    "import transformers": "transformers",
    "import transformers.modeling_utils": "transformers.modeling_utils",
}
_TIMED = """import time
start = time.perf_counter()
import {first}
then = time.perf_counter()
import transformers_quip
print(then - start, time.perf_counter() - then)"""


def tensors() -> Iterator[tuple[str, str, list[int], int]]:
    """(name, dtype, shape, bytes) of every tensor of the large model."""
    small = HIDDEN * KEY_VALUE_HEADS // HEADS
    linears = {
        **{f"self_attn.{n}_proj": (m, HIDDEN) for n, m in (("q", HIDDEN), ("k", small), ("v", small), ("o", HIDDEN))},
        **{f"mlp.{name}_proj": (INTERMEDIATE, HIDDEN) for name in ("gate", "up")},
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
    }
    yield "model.embed_tokens.weight", "BF16", [VOCABULARY, HIDDEN], 2 * VOCABULARY * HIDDEN
    for layer in range(LAYERS):
        for name, (m, n) in linears.items():
            path = f"model.layers.{layer}.{name}"
            yield f"{path}.codes", "I16", [m, n // 8], m * n // 4
            yield f"{path}.su", "BF16", [n], 2 * n
            yield f"{path}.sv", "BF16", [m], 2 * m
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{layer}.{name}.weight", "BF16", [HIDDEN], 2 * HIDDEN
    yield "model.norm.weight", "BF16", [HIDDEN], 2 * HIDDEN
    yield "lm_head.weight", "BF16", [VOCABULARY, HIDDEN], 2 * VOCABULARY * HIDDEN


def write_large_model(folder: Path, headers: bool) -> None:
    """config.json and model.safetensors.index.json; with `headers` also the files, each a header and a hole."""
    shards: list[list[tuple[str, str, list[int], int]]] = [[]]
    for entry in tensors():
        if shards[-1] and sum(other[3] for other in shards[-1]) + entry[3] > SHARD:
            shards.append([])
        shards[-1].append(entry)
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    weight_map = {entry[0]: name for name, shard in zip(names, shards, strict=True) for entry in shard}
    total = sum(entry[3] for entry in tensors())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_VALUE_HEADS,
        "vocab_size": VOCABULARY,
        "quantization_config": {"quant_method": "quip", "format_version": 1, "bits": 2, "codebook": "e8p"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    for name, shard in zip(names if headers else [], shards, strict=headers):
        header, end = {}, 0
        for key, dtype, shape, size in shard:
            header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
            end += size
        raw = json.dumps(header).encode()
        with (folder / name).open("wb") as file:
            file.write(struct.pack("<Q", len(raw)) + raw)
            file.truncate(8 + len(raw) + end)


def run(*arguments: str) -> tuple[float, float, str]:
    """(wall seconds, peak RSS in bytes, stdout) of one process of this Python; it must succeed."""
    start = time.perf_counter()
    child = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True)
    said = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        sys.exit(f"{' '.join(arguments)} ended with status {status}")
    return seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024), said


def measure(runs: int) -> list[dict]:
    """The rows of the table: name, median seconds, largest peak."""
    rows = []

    def add(name: str, limit: str, seconds: list[float], peaks: list[float]) -> None:
        rows.append({"what": name, "seconds": statistics.median(seconds), "peak_rss": max(peaks), "limit": limit})

    for name, first in IMPORTS.items():
        _, peaks, said = zip(*(run("-c", _TIMED.format(first=first)) for _ in range(runs)), strict=True)
        before, ours = zip(*(map(float, line.split()) for line in said), strict=True)
        add(name, "", before, peaks)
        add("... import transformers_quip adds", "0.3 s" if first == "transformers" else "", ours, peaks)
    commands = {"transformers-quip --help": ("0.7 s", "--help")}
    with tempfile.TemporaryDirectory() as temporary:
        for name, headers in (("index alone", False), ("with all headers", True)):
            folder = Path(temporary) / str(headers)
            folder.mkdir()
            write_large_model(folder, headers)
            commands[f"inspect, 70 billion parameters, {name}"] = ("2 s, 300 MB", "inspect", str(folder))
        for name, (limit, *arguments) in commands.items():
            seconds, peaks, _ = zip(*(run("-m", "transformers_quip.cli", *arguments) for _ in range(runs)), strict=True)
            add(name, limit, seconds, peaks)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    rows = measure(options.runs)
    print(f"{'':65} {'seconds':>8} {'peak MB':>8}  limit")
    for row in rows:
        print(f"{row['what']:65} {row['seconds']:8.3f} {row['peak_rss'] / 1e6:8.0f}  {row['limit']}")
    import machine  # imported late: it imports PyTorch, and on Linux a child's peak RSS begins with its parent's

    machine.save("startup", {"runs": options.runs, "rows": rows})


if __name__ == "__main__":
    main()
