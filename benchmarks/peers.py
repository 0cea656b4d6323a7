"""Tokens per second beside llama.cpp: a random Llama with hidden size 2048, 2 bits here, and Q2_K, IQ2_XXS and Q4_0 there.

    python benchmarks/peers.py [--python PATH] [--threads N ...] [--repeats N] [--shared]

llama.cpp's Python binding, `llama-cpp-python`, is compiled with AVX2 but without AVX-512 into a virtual environment in
build/llama (minutes); --python: one that has it, with numpy and gguf. Run this with QUIP_KERNELS_CPU_LEVEL=avx2 to compare
like with like; PyTorch still uses all instructions there are, for a bfloat16 head and for attention.
Blocks of the files are random, which changes no time, and llama.cpp need not choose tokens. Both engines compute in turns;
medians are compared. "prompt" is 512 tokens in one pass, "generate" 64 tokens after a prompt of 16. Our model is measured
twice, with the output head in bfloat16 and in 4 bits (modules={"lm_head": {"bits": 4}}); ggml's types have a head of 6.6
bits. With --shared, for a machine that others use too, CPU time of one thread is measured. A breakdown says where the time
of our tokens goes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

import machine
import torch
from generate import NEW_TOKENS, PREFILL, PROMPT, save_random_llama
from transformers import AutoModelForCausalLM

import transformers_quip
from transformers_quip import QuipConfig

FOLDER = Path(__file__).resolve().parents[1] / "build" / "llama"
WORKER = Path(__file__).with_name("llama_cpp_worker.py")
# Our models: their names, and options of QuipConfig.
OURS: dict[str, dict[str, Any]] = {"2 bits": {}, "2 bits, head 4 bits": {"modules": {"lm_head": {"bits": 4}}}}
TYPES = ("Q2_K", "IQ2_XXS", "Q4_0")
FLAGS = "-DGGML_NATIVE=OFF -DGGML_AVX512=OFF -DLLAVA_BUILD=OFF -DLLAMA_CURL=OFF " + " ".join(
    f"-DGGML_{name}=ON" for name in ("AVX", "AVX2", "FMA", "F16C", "BMI2")
)


def install() -> Path:
    """The Python of a virtual environment with llama.cpp's binding, compiled for AVX2 if it is not there yet."""
    python = FOLDER / "venv" / "bin" / "python"
    if subprocess.run([python, "-c", "import llama_cpp, gguf"], capture_output=True).returncode if python.exists() else 1:
        venv.create(FOLDER / "venv", with_pip=True)
        command = [python, "-m", "pip", "install", "--no-binary", "llama-cpp-python", "llama-cpp-python", "gguf"]
        environment = os.environ | {"CMAKE_ARGS": FLAGS, "CMAKE_BUILD_PARALLEL_LEVEL": "1"}
        subprocess.run(["nice", "-n", "10", *command], check=True, env=environment)
    return python


class Peer:
    """llama.cpp with one file, in a process of its own."""

    def __init__(self, python: Path, kind: str, threads: int, folder: str):
        command = [str(python), str(WORKER), kind, str(threads), folder]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.system = self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("llama.cpp's process ended")
        return line.strip()

    def seconds(self, kind: str) -> tuple[float, float]:
        """Time and CPU time of one "prompt" or "generate"."""
        assert self._process.stdin is not None
        print(kind, PROMPT, NEW_TOKENS if kind == "generate" else PREFILL, file=self._process.stdin, flush=True)
        wall, processor = map(float, self._answer().split())
        return wall, processor

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


class Ours:
    """A 2-bit model with int8 activations, the default.

    Args:
        folder: of the dense model.
        chosen: further options of QuipConfig.
    """

    def __init__(self, folder: str, chosen: dict[str, Any]):
        config = QuipConfig(bits=2, dataset=None, **chosen)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config)
        self.model = model.eval()
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(3, self.model.config.vocab_size, (1, PREFILL), generator=generator)

    def run(self, kind: str) -> None:
        """Compute one "prompt" or "generate"."""
        if kind == "prompt":
            self.model(self.ids, logits_to_keep=1, use_cache=True)
        else:
            self.model.generate(self.ids[:, :PROMPT], max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)

    def seconds(self, kind: str) -> tuple[float, float]:
        """See [`Peer.seconds`]."""
        start, begin = time.perf_counter(), time.process_time()
        self.run(kind)
        return time.perf_counter() - start, time.process_time() - begin

    def breakdown(self) -> dict[str, float]:
        """Shares of the time of a token: the library's calls for layers, the output head, the rest."""
        from quip_kernels import cpu_library

        library, spent = cpu_library.loaded(), {"library": 0.0, "output head": 0.0}
        head = self.model.lm_head.forward

        def timed(name: str, function: Any) -> Any:
            def call(*arguments: Any, **named: Any) -> Any:
                start = time.perf_counter()
                try:
                    return function(*arguments, **named)
                finally:
                    spent[name] += time.perf_counter() - start

            return call

        whole_function = library.quip_linear
        for module in self.model.modules():
            if hasattr(module, "_prepared"):
                module._prepared = None
        library.quip_linear = timed("library", whole_function)
        self.model.lm_head.forward = timed("output head", head)
        try:
            self.run("generate")  # layers are prepared with the timed function
            spent.update(dict.fromkeys(spent, 0.0))
            start = time.perf_counter()
            self.run("generate")
            whole = time.perf_counter() - start
        finally:
            library.quip_linear, self.model.lm_head.forward = whole_function, head
        if isinstance(self.model.lm_head, transformers_quip.QuipLinear):  # the library computes the head, too
            spent["library"] -= spent["output head"]
        shares = {name: seconds / whole for name, seconds in spent.items()}
        return {
            **shares,
            "Python, attention and norms": 1 - sum(shares.values()),
            "milliseconds a token": 1e3 * whole / NEW_TOKENS,
        }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, help="has llama_cpp, numpy and gguf; default: one is made")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shared", action="store_true", help="CPU time of one thread")
    options = parser.parse_args()
    python = options.python or install()
    transformers_quip.set_activations("int8")
    rows, shares, system = [], {}, ""
    with tempfile.TemporaryDirectory() as folder:
        save_random_llama(folder)
        ours = {name: Ours(folder, chosen) for name, chosen in OURS.items()}
        for threads in [1] if options.shared else options.threads:
            torch.set_num_threads(threads)
            peers = {f"llama.cpp {kind}": Peer(python, kind, threads, folder) for kind in TYPES}
            system = next(iter(peers.values())).system
            engines: dict[str, Any] = {**ours, **peers}
            for kind, tokens in (("generate", NEW_TOKENS), ("prompt", PREFILL)):
                taken: dict[str, list[float]] = {name: [] for name in engines}
                for repeat in range(options.repeats + 1):
                    for name, engine in engines.items():
                        found = engine.seconds(kind)[options.shared]
                        if repeat:  # the first of each warms up
                            taken[name].append(found)
                rates = {name: tokens / statistics.median(found) for name, found in taken.items()}
                for name, rate in rates.items():
                    ratios = [rates[own] / rate for own in ours]
                    listed = ", ".join(f"{ratio:.2f} x" for ratio in ratios)
                    print(f"{threads} threads, {kind:8s} {name:20s} {rate:8.1f} tokens/s, ours {listed}", flush=True)
                    row = {"threads": threads, "kind": kind, "engine": name, "tokens_per_second": rate, "ours": ratios}
                    rows.append(row)
            shares[str(threads)] = {name: one.breakdown() for name, one in ours.items()}
            print(shares[str(threads)])
            for peer in peers.values():
                peer.close()
    machine.save("llama_cpp", {"cpu_time": options.shared, "llama_cpp": system, "rows": rows, "breakdown": shares})


if __name__ == "__main__":
    sys.exit(main())
