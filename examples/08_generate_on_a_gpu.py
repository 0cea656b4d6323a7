"""Generate on a GPU with a static cache and compiled code, which replays CUDA graphs, and compare with the plain way.

    python examples/08_generate_on_a_gpu.py FOLDER [--prompt TEXT] [--tokens 128] [--any-device]

FOLDER is a quantized model or its id on the Hub. The two lines that matter are in `compile_for_generation`. The first call
compiles the model and may take minutes; later calls do not wait for that. Without a GPU, Transformers does not compile:
--any-device does it with a debugging backend that needs no C compiler, to see that it works.

Output, with the numbers of your device:

    eager, growing cache: ... tokens/s
    compiled, static cache: ... tokens/s, after ... s for the first call
    the same tokens: yes
"""

from __future__ import annotations

import argparse
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, CompileConfig, PreTrainedModel

import transformers_quip  # noqa: F401 - makes Transformers understand quantized models


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder, or an id on the Hub")
    parser.add_argument("--prompt", default="Two bits are enough to")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens")
    parser.add_argument("--any-device", action="store_true", help="compile on a CPU, too")
    return parser.parse_args()


def compile_for_generation(model: PreTrainedModel, any_device: bool = False) -> None:
    """Let every later `generate` use memory of a fixed size for keys and values, and compiled code for each new token."""
    model.generation_config.cache_implementation = "static"
    model.generation_config.compile_config = CompileConfig(mode="reduce-overhead", fullgraph=True)
    if any_device:
        model.generation_config.compile_config = CompileConfig(mode=None, backend="aot_eager", fullgraph=True)
        model.generation_config.compile_config._compile_all_devices = True  # Transformers' switch for tests


def timed(model: PreTrainedModel, inputs: dict[str, torch.Tensor], tokens: int) -> tuple[torch.Tensor, float]:
    """The new tokens, and the seconds for them."""
    begin = time.perf_counter()
    ids = model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    new = ids[0, inputs["input_ids"].shape[1] :].cpu()  # waits for the device
    return new, time.perf_counter() - begin


def main(options: argparse.Namespace) -> None:
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto", device_map="auto")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    inputs = dict(tokenizer(options.prompt, return_tensors="pt").to(model.device))
    timed(model, inputs, 2)  # the kernels prove themselves on a new device, and are tuned
    eager, seconds = timed(model, inputs, options.tokens)
    print(f"eager, growing cache: {options.tokens / seconds:.1f} tokens/s", flush=True)
    compile_for_generation(model, options.any_device)
    _, first = timed(model, inputs, options.tokens)
    timed(model, inputs, options.tokens)  # records the graphs
    compiled, seconds = timed(model, inputs, options.tokens)
    print(f"compiled, static cache: {options.tokens / seconds:.1f} tokens/s, after {first:.1f} s for the first call")
    # rounding in another order may lead to another token where two are nearly as likely
    same = int((eager == compiled).int().cumprod(0).sum())
    print(f"the same tokens: {'yes' if same == options.tokens else f'the first {same}'}")


if __name__ == "__main__":
    main(arguments())
