"""Loading checkpoints of other packages: memory relative to the size of the file, time, and the re-packing alone.

    python benchmarks/loading.py [--families NAME ...] [--megabytes N] [--folder FOLDER]

Writes a checkpoint of random codes of each family for a Llama of 2048 channels, of the given size, in a temporary
folder; then a new process loads it on one thread. "peak" is the largest growth of resident memory during
`from_pretrained`, "end" the growth afterwards, both divided by the file's size. "seconds" is the wall time with the file
not in the system's cache, and "read" the time to read the file alone, also uncached. "limit" is twice the time for reading
and re-packing at 200 MB/s. "re-packed" is megabytes of codes for each second of CPU time, linear by linear. "convert" is
the peak of converting on disk, in megabytes, which must not grow with the file.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import machine
import torch
from safetensors.torch import save_file

HIDDEN, INTERMEDIATE, VOCABULARY, HEADS = 2048, 8192, 1024, 16
SEPARATE = {
    **{f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"},
    **dict.fromkeys(("mlp.up_proj", "mlp.gate_proj"), (INTERMEDIATE, HIDDEN)),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
FUSED = {
    "self_attn.qkv_proj": (3 * HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.upgate_proj": (2 * INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
REPACKING = 200e6  # target, in bytes per second
COLUMNS = {
    "    MB": ("megabytes", 0),
    "peak": ("peak", 2),
    " end": ("end", 2),
    "seconds": ("seconds", 2),
    " read": ("read_seconds", 2),
    "limit": ("limit_seconds", 2),
    "re-packed": ("repacked_megabytes_per_second", 0),
    "convert": ("convert_megabytes", 0),
}
Tensors = dict[str, torch.Tensor]


def random(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Random bits."""
    return torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8).view(dtype).view(shape)


def quip_sharp(identity: int, words: int) -> Callable[[str, int, int], Tensors]:
    def make(name: str, m: int, n: int) -> Tensors:
        tensors = {"Qidxs": random(torch.int64, m, n // 64 * words), "SU": torch.ones(n), "SV": torch.ones(m) / n}
        tensors |= {"Wscale": torch.ones(()), "codebook_id": torch.tensor(identity)}
        parts = {"qkv_proj": 3, "upgate_proj": 2}.get(name.rpartition(".")[2])
        return tensors if parts is None else {**tensors, "fuse_scales": torch.ones(parts)}

    return make


def quip_for_all(dtype: torch.dtype, words: int) -> Callable[[str, int, int], Tensors]:
    def make(name: str, m: int, n: int) -> Tensors:
        vectors = {"SU": torch.ones(n), "SV": torch.ones(m) / n, "Wscale": torch.ones(())}
        return {"Qidxs": random(dtype, m, n // 32 * words), **vectors, "weight": torch.zeros(())}

    return make


def qtip(k: int) -> Callable[[str, int, int], Tensors]:
    def make(name: str, m: int, n: int) -> Tensors:
        vectors = {"SU": torch.ones(n), "SV": torch.ones(m) / n, "tlut": torch.randn(512, 2)}
        return {"trellis": random(torch.int16, m * n // 256, 16 * k), **vectors, "rcp": torch.tensor(0)}

    return make


def exl3(k: int) -> Callable[[str, int, int], Tensors]:
    def make(name: str, m: int, n: int) -> Tensors:
        vectors = {"suh": torch.ones(n), "svh": torch.ones(m) / n, "mul1": torch.tensor(-2082680531).int()}
        return {"trellis": random(torch.int16, n // 16, m // 16, 16 * k), **vectors}

    return make


def params(**values) -> dict:
    return {"quip_params": values}


def config(**values) -> dict:
    return {"quantization_config": values}


HYB = {"codebook": "bitshift", "decode_mode": "quantlut_sym", "L": 16, "V": 2, "tlut_bits": 9, "td_x": 16, "td_y": 16}
# name → (content of config.json, the linears, their tensors, bits per weight)
FAMILIES = {
    "QuIP# 2 bits": (params(codebook="E8P12", codebook_version=1), FUSED, quip_sharp(7, 2), 2),
    "QuIP# 4 bits": (params(codebook="E8P12RVQ4B", codebook_version=1), FUSED, quip_sharp(17, 4), 4),
    "QuIP-for-all E8P12": (config(quant_method="QUiP", codebook="E8P12"), SEPARATE, quip_for_all(torch.int16, 4), 2),
    "QuIP-for-all RVQ 3 bits": (
        config(quant_method="QUiP", codebook="E8P12RVQ3B", opt_resid_scale=0.5),
        SEPARATE,
        quip_for_all(torch.int32, 3),
        3,
    ),
    "QuIP-for-all D4": (config(quant_method="QUiP", codebook="D4"), SEPARATE, quip_for_all(torch.uint8, 8), 2),
    "QuIP-for-all HI": (config(quant_method="QUiP", codebook="HI"), SEPARATE, quip_for_all(torch.int32, 4), 4),
    "QTIP 2 bits": (params(**HYB, K=2), SEPARATE, qtip(2), 2),
    "QTIP 3 bits": (params(**HYB, K=3), SEPARATE, qtip(3), 3),
    "EXL3 2 bits": (config(quant_method="exl3"), SEPARATE, exl3(2), 2),
    "EXL3 5 bits": (config(quant_method="exl3"), SEPARATE, exl3(5), 5),
}


def write(family: str, folder: Path, megabytes: int) -> None:
    """A checkpoint of about this size."""
    described, linears, make, bits = FAMILIES[family]
    layers = max(1, round(megabytes * 8e6 / bits / sum(m * n for m, n in linears.values())))
    values = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "vocab_size": VOCABULARY,
        "torch_dtype": "float16",
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(values | described))
    tensors = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"))
    tensors = {name: torch.randn(VOCABULARY, HIDDEN) for name in tensors} | {"model.norm.weight": torch.ones(HIDDEN)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{name}.weight"] = torch.ones(HIDDEN)
        for name, (m, n) in linears.items():
            tensors |= {f"{prefix}.{name}.{kind}": value for kind, value in make(name, m, n).items()}
    tensors = {name: value.half() if value.is_floating_point() else value for name, value in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def forget(file: Path) -> None:
    """Ask the system to drop the file from its cache, if it can be asked."""
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def status(field: str) -> int:
    """A number of bytes from /proc/self/status."""
    with open("/proc/self/status", encoding="utf-8") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def load(folder: Path) -> dict[str, float]:
    """In the child process: load the checkpoint, and measure."""
    torch.set_num_threads(1)
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    import transformers_quip  # noqa: F401 - registers the methods

    logging.disable_progress_bar()
    plain = AutoConfig.from_pretrained(folder)
    for key in ("quip_params", "quantization_config"):
        if hasattr(plain, key):
            delattr(plain, key)
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(plain)  # imports the code that every model needs
    from transformers_quip.hf import foreign as repacking

    spent = {"bytes": 0, "seconds": 0.0}
    original = repacking.repack

    def repack(linear, tensors, model):
        tensors = {kind: tensor.clone() for kind, tensor in tensors.items()}  # forces them to be read from the file
        start = time.thread_time()
        result = original(linear, tensors, model)
        spent["seconds"] += time.thread_time() - start
        spent["bytes"] += sum(tensor.nbytes for tensor in tensors.values())
        return result

    repacking.repack = repack
    file = folder / "model.safetensors"
    forget(file)
    start = time.perf_counter()
    with file.open("rb", buffering=0) as stream:
        piece = bytearray(1 << 20)
        while stream.readinto(piece):
            pass
    read = time.perf_counter() - start
    forget(file)
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    before = status("VmRSS")
    start, cpu = time.perf_counter(), time.process_time()
    model = AutoModelForCausalLM.from_pretrained(folder)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    size = file.stat().st_size
    row = {
        "megabytes": size / 1e6,
        "peak": (status("VmHWM") - before) / size,
        "end": (status("VmRSS") - before) / size,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "read_seconds": read,
        "limit_seconds": 2 * (read + size / REPACKING),
        "repacked_megabytes_per_second": spent["bytes"] / spent["seconds"] / 1e6,
    }
    del model
    from transformers_quip.checkpoints import memory
    from transformers_quip.hf.convert import convert

    memory.return_memory([os.path.realpath(file)])
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    convert(folder, folder / "native")
    return row | {"convert_megabytes": (status("VmHWM") - before) / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES, metavar="NAME")
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--folder", type=Path, help="where the temporary folders are made")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)  # used by the child processes
    options = parser.parse_args()
    if options.load:
        print(json.dumps(load(options.load)))
        return
    rows = []
    print(" " * 24 + "".join(f"{title:>{len(title) + 2}s}" for title in COLUMNS))
    for family in options.families:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            write(family, Path(folder), options.megabytes)
            command = [sys.executable, __file__, "--load", folder]
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        row = {"family": family, **json.loads(run.stdout.splitlines()[-1])}
        rows.append(row)
        cells = (f"{row[key]:{len(title) + 2}.{digits}f}" for title, (key, digits) in COLUMNS.items())
        print(f"{family:24s}{''.join(cells)}", flush=True)
    machine.save("loading", {"rows": rows})


if __name__ == "__main__":
    main()
