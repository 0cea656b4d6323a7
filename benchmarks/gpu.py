"""Speed on a GPU: products with codes against the memory's speed, experts and generate() against dense ones, quantizing.

    PYTHONPATH=.:kernels/torch-ext python benchmarks/gpu.py [--only PART] [--model NAME] [--minutes M] [--name NAME]

Needs a GPU and nothing else: models are made on the device from random codes, as speed does not depend on the values. Takes
a few minutes, most of them in torch.compile; work that does not fit into --minutes is left out and named. Prints tables
and writes results/NAME.json after each part: a part that fails is named there, and the others are still measured.
`benchmarks/gpu_run.sh` runs the parts one by one, each in a process of its own.
"""

from __future__ import annotations

import argparse
import functools
import gc
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence

import machine
import torch
from torch import nn

from transformers_quip import QuipLinear, set_backend

DEVICE = torch.device("cuda")
CODEBOOKS = {2: "e8p", 3: "e8p-rvq3", 4: "e8p-rvq4"}
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (28672, 8192))
# The weights take turns, so that none is read from a cache: together they are larger than any GPU's last-level cache.
ROTATED_BYTES = 512 << 20
COPIED_BYTES = 1 << 30
# Share of the time for each part, if all are measured.
SHARES = {"layers": 0.35, "experts": 0.05, "quantize": 0.1, "generate": 0.5}
COLUMNS = ("bits", "m", "n", "matvec_int8_us", "matvec_exact_us", "matvec_int8_share", "matvec_exact_share")
COLUMNS += ("layer_us", "dense_us", "layer_speedup")
# Experts, of which each token takes some; the shape of one expert's matrix.
EXPERTS, CHOSEN, EXPERT_SHAPES = 64, 4, ((2048, 768), (768, 2048))
EXPERT_COLUMNS = ("m", "n", "tokens", "grouped_us", "dense_us", "speedup")
MODELS = {
    "llama-3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
    },
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
    },
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=7.0, help="start only parts that end by then (default: 7)")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of generate() (default: 128)")
    parser.add_argument("--model", choices=list(MODELS), default="llama-3-8b", help="sizes for generate and quantize")
    parser.add_argument("--layers", type=int, help="decoder blocks for generate (default: the model's)")
    parser.add_argument("--only", choices=list(SHARES), help="one of the parts")
    parser.add_argument("--name", default="gpu", help="write results/NAME.json (default: gpu)")
    options = parser.parse_args(arguments)
    options.layers = MODELS[options.model]["num_hidden_layers"] if options.layers is None else options.layers
    if options.tokens < 2 or options.layers < 1 or options.minutes <= 0:
        parser.error("--tokens must be at least 2, --layers at least 1, --minutes positive")
    return options


def random_linear(m: int, n: int, device: torch.device, dtype: torch.dtype, codebook: str = "e8p") -> QuipLinear:
    """A quantized linear with random codes, whose output has about the size of its input; packed where kernels run."""
    linear = QuipLinear(n, m, False, codebook=codebook, device=device, dtype=dtype)
    with torch.no_grad():
        for codes in linear.weight_tensors():
            limits = torch.iinfo(codes.dtype)
            codes.random_(limits.min, limits.max + 1)
        linear.su.fill_(1.0)
        linear.sv.fill_(n**-0.5)
    linear.pack_if_wanted()
    return linear


def quantize_randomly(model: nn.Module) -> int:
    """Put a [`random_linear`] in the place of every linear of the decoder blocks; returns how many there were."""
    blocks = model.model.layers
    linears = [(name, module) for name, module in blocks.named_modules() if type(module) is nn.Linear]
    for name, module in linears:
        parent, _, child = name.rpartition(".")
        weight = module.weight
        setattr(blocks.get_submodule(parent), child, random_linear(*weight.shape, weight.device, weight.dtype))
    return len(linears)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Text in columns: numbers to the right, with three significant digits."""
    text = [[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(header), *text]) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *text]
    )


def seconds(calls: Sequence[Callable[[], object]], repeat: int = 7) -> float:
    """Median time of one of the calls, replayed together as a CUDA graph so that launches cost nothing."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # the stream that made the tensors
    with torch.cuda.stream(stream):
        for call in calls:  # compiles, and measures the fastest tile, which is not possible while recording
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(repeat):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times) / len(calls)


def copy_bandwidth() -> float:
    """Bytes read and written a second by a copy of `COPIED_BYTES`."""
    source = torch.empty(COPIED_BYTES, dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds([lambda: target.copy_(source)] * 4)


def measure_layer(m: int, n: int, bits: int, bandwidth: float) -> dict:
    """Times of one vector in bfloat16 through [m, n]: the product alone in both precisions, the layer, the dense layer.

    Shares are of the copy bandwidth, counting the bytes of packed codes and nothing else.
    """
    from quip_kernels.gpu import matvec, quantize

    dtype = torch.bfloat16
    probe = random_linear(m, n, DEVICE, dtype, CODEBOOKS[bits])
    packed_bytes = sum(codes.numel() * codes.element_size() for codes in probe.weight_tensors())
    count = min(max(2, -(-ROTATED_BYTES // packed_bytes)), 64)
    linears = [probe] + [random_linear(m, n, DEVICE, dtype, CODEBOOKS[bits]) for _ in range(count - 1)]
    x = torch.randn(1, n, device=DEVICE, dtype=dtype)
    result = {"bits": bits, "m": m, "n": n, "packed_bytes": packed_bytes}
    with torch.no_grad():
        for name, digits in (("int8", 1), ("exact", 2)):
            quantized = quantize.quantize(x.float(), digits)
            weights = [(*linear.weight_tensors(), None)[:2] for linear in linears]  # no second stage for two bits
            calls = [lambda w=w, q=quantized: matvec.matvec(q, w[0], n, w[1], 0.3) for w in weights]
            result[f"matvec_{name}_us"] = seconds(calls) * 1e6
            result[f"matvec_{name}_share"] = packed_bytes / (result[f"matvec_{name}_us"] * 1e-6) / bandwidth
        result["layer_us"] = seconds([lambda w=w: w(x) for w in linears]) * 1e6
        del linears, weights, calls
        dense = [torch.randn(m, n, device=DEVICE, dtype=dtype) for _ in range(max(2, -(-ROTATED_BYTES // (2 * m * n))))]
        result["dense_us"] = seconds([lambda w=w: nn.functional.linear(x, w) for w in dense]) * 1e6
        result["layer_speedup"] = result["dense_us"] / result["layer_us"]
    return result


def check_values(shape: tuple[int, int] = (1024, 4096)) -> float:
    """Largest relative error of bfloat16 layers on the device against float64 on the CPU: a wrong kernel has no speed.

    Vectors enough for each kernel: the integer product, tensor cores, and a dense weight.
    """
    largest = 0.0
    for codebook in CODEBOOKS.values():
        linear = random_linear(*shape, DEVICE, torch.bfloat16, codebook)
        x = torch.randn(80, shape[1], device=DEVICE, dtype=torch.bfloat16)
        with torch.no_grad():
            got = {vectors: linear(x[:vectors]).double().cpu() for vectors in (1, 4, 16, 80)}
            wanted = linear.cpu().double()(x.cpu().double())
        for vectors, y in got.items():
            error = float((y - wanted[:vectors]).norm() / wanted[:vectors].norm())
            if not error < 1e-2:  # rounding to bfloat16 makes 2e-3 to 4e-3
                raise RuntimeError(f"{codebook} is wrong here for {vectors} vectors: relative error {error:.2e}")
            largest = max(largest, error)
    return largest


def tokens_per_second(model: nn.Module, tokens: int, compiled: bool) -> dict:
    """Speed (median of three) and time of the first calls of generate(): eager, or compiled with a static cache."""
    ids = torch.randint(0, model.config.vocab_size, (1, 16), device=model.device)
    settings = {
        "max_new_tokens": tokens,
        "min_new_tokens": tokens,
        "do_sample": False,
        "cache_implementation": "static" if compiled else None,
        "pad_token_id": 0,
        "attention_mask": torch.ones_like(ids),
    }
    begin = time.perf_counter()
    for _ in range(2):  # compiles, then records the graphs
        model.generate(ids, **settings)
        torch.cuda.synchronize()
    warm_up = time.perf_counter() - begin
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        model.generate(ids, **settings)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return {
        "tokens_per_second": tokens / statistics.median(times),
        "first_calls_seconds": warm_up,
        "model_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
    }


def measure_layers(result: list[dict], bandwidth: float, deadline: float) -> None:
    """[`measure_layer`] for every shape and number of bits until the deadline, one entry of `result` after the other."""
    for bits in CODEBOOKS:
        for m, n in SHAPES:
            if time.perf_counter() > deadline:
                print(f"no time is left for [{m}, {n}] with {bits} bits: use --only layers, or more --minutes")
                continue
            result.append(measure_layer(m, n, bits, bandwidth))
            torch.cuda.empty_cache()


def measure_experts(result: list[dict], deadline: float) -> None:
    """A projection of all tokens' experts in one call, at 2 bits, against as many dense linears that are known in advance.

    The stacks and the chosen experts take turns, as in [`measure_layer`]. Products only: neither side has a gate.
    """
    dtype, generator = torch.bfloat16, torch.Generator().manual_seed(0)
    for m, n in EXPERT_SHAPES:
        count = max(2, -(-ROTATED_BYTES // (EXPERTS * m * n // 4 * 8)))
        codes = [
            torch.empty(EXPERTS, m, n // 8, dtype=torch.int16, device=DEVICE).random_(-32768, 32768) for _ in range(count)
        ]
        su, sv = (
            torch.full((EXPERTS, size), value, device=DEVICE, dtype=dtype) for size, value in ((n, 1.0), (m, n**-0.5))
        )
        dense = torch.randn(EXPERTS, m, n, device=DEVICE, dtype=dtype)
        for tokens in (1, 16):
            if time.perf_counter() > deadline:
                print(f"no time is left for {tokens} tokens' experts of [{m}, {n}]: use --only experts, or more --minutes")
                continue
            x = torch.randn(tokens * CHOSEN, n, device=DEVICE, dtype=dtype)
            grouped, apart = [], []
            for turn in range(16):
                choices = [torch.randperm(EXPERTS, generator=generator)[:CHOSEN] for _ in range(tokens)]
                ends = torch.cat(choices).bincount(minlength=EXPERTS).cumsum(0)
                arguments = (x, ends.to(DEVICE), [codes[turn % count]], su, sv, "e8p", "hadamard", "hadamard", 0)
                grouped.append(functools.partial(torch.ops.quip.grouped_linear, *arguments))
                parts = x.split(ends.diff(prepend=ends.new_zeros(1)).tolist())
                pairs = [(part, dense[expert]) for expert, part in enumerate(parts) if len(part)]
                apart.append(lambda pairs=pairs: [nn.functional.linear(*pair) for pair in pairs])
            with torch.no_grad():
                row = {
                    "m": m,
                    "n": n,
                    "tokens": tokens,
                    "grouped_us": seconds(grouped) * 1e6,
                    "dense_us": seconds(apart) * 1e6,
                }
            result.append({**row, "speedup": row["dense_us"] / row["grouped_us"]})
        del codes, dense


def measure_generate(result: dict, model: str, layers: int, tokens: int, deadline: float) -> None:
    """A model in bfloat16 with random weights, and then with random codes, eager and compiled; written into `result`."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    begin = time.perf_counter()
    config = LlamaConfig(**{**MODELS[model], "num_hidden_layers": layers}, bos_token_id=None, eos_token_id=None)
    with DEVICE:
        network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    result |= {"model": model, "layers": layers, "new_tokens": tokens, "dense": {}, "quip": {}, "speedup": {}}
    for side in ("dense", "quip"):
        if side == "quip":
            torch._dynamo.reset()  # the compiled code is not needed any more, and its graphs hold memory
            result["replaced"] = quantize_randomly(network)
            gc.collect()
            torch.cuda.empty_cache()
            now = time.perf_counter()
            if now + (now - begin) > deadline:  # it compiles as much as the dense one
                print("no time is left for the quantized model: use --only generate, or more --minutes")
                return
        for kind in ("eager", "compiled"):
            result[side][kind] = found = tokens_per_second(network, tokens, kind == "compiled")
            print(f"{model}, {side}, {kind}: {found['tokens_per_second']:.1f} tokens/s", flush=True)
    for kind, dense in result["dense"].items():
        result["speedup"][kind] = result["quip"][kind]["tokens_per_second"] / dense["tokens_per_second"]
        print(f"{model}, {kind}: {result['speedup'][kind]:.2f} times the dense model", flush=True)


def measure_quantize(result: list[dict], model: str, deadline: float) -> None:
    """Seconds to round the linears of one block of a model, each group that reads one input; one entry for each group.

    Inputs are correlated, as those of models are: a random walk over the columns.
    """
    from transformers_quip import QuipConfig
    from transformers_quip.quantize.layer import quantize_weights

    sizes = MODELS[model]
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    small = hidden * sizes["num_key_value_heads"] // sizes["num_attention_heads"]
    groups = {"q, k, v": (hidden, [hidden, small, small]), "o": (hidden, [hidden])}
    groups |= {"gate, up": (hidden, [inner, inner]), "down": (inner, [hidden])}
    for name, (columns, rows) in groups.items():
        if time.perf_counter() > deadline:
            print(f"no time is left to round {name}: use --only quantize, or more --minutes")
            return
        x = torch.randn(2 * columns, columns, device=DEVICE).cumsum(1) / columns**0.5
        hessian = x.T @ x / len(x)
        weights = {f"{name} {index}": torch.randn(size, columns, device=DEVICE) for index, size in enumerate(rows)}
        begin = time.perf_counter()
        found = quantize_weights(weights, hessian, QuipConfig(bits=2))
        errors = [quantized.statistics["relative_error"] for quantized in found.values()]  # waits for the device
        result.append({"group": name, "rows": rows, "columns": columns, "seconds": time.perf_counter() - begin})
        result[-1] |= {"relative_error": max(errors), "bytes": torch.cuda.max_memory_allocated()}
        print(f"{name}: {rows} x {columns} in {result[-1]['seconds']:.2f} s", flush=True)


def attempt(results: dict, name: str, part: str, compute: Callable[..., object], *arguments: object) -> object:
    """The result of `compute`; None if it fails: the error goes into the results, and other parts are still measured."""
    try:
        return compute(*arguments)
    except Exception as error:
        traceback.print_exc()
        results.setdefault("errors", {})[part] = f"{type(error).__name__}: {error}"
        gc.collect()
        torch.cuda.empty_cache()
        return None
    finally:
        machine.save(name, results)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py needs a GPU that PyTorch can use (torch.cuda), and none was found.", file=sys.stderr)
        return 1
    from quip_kernels.gpu import tune

    begin = time.perf_counter()
    set_backend("triton")
    tune.SECONDS = 90.0  # time to measure every shape; a program that only runs a model should not wait for that
    properties = torch.cuda.get_device_properties(0)
    results = {"gpu": properties.name, "processors": properties.multi_processor_count, "memory": properties.total_memory}
    print(f"{properties.name}, PyTorch {torch.__version__}", flush=True)
    trial = functools.partial(attempt, results, options.name)
    results["relative_error"] = trial("values", check_values)
    parts = [options.only] if options.only else list(SHARES)
    deadline = begin
    for part in parts:
        deadline += 60 * options.minutes * (1 if options.only else SHARES[part])
        if part == "layers":
            results["copy_bandwidth"] = bandwidth = trial("copy", copy_bandwidth)
            results["layers"] = []
            if bandwidth is not None:
                print(f"copy: {bandwidth / 1e9:.0f} GB/s", flush=True)
                trial("layers", measure_layers, results["layers"], bandwidth, deadline)
            print(table(COLUMNS, [[layer[column] for column in COLUMNS] for layer in results["layers"]]), flush=True)
        elif part == "experts":
            results["experts"] = []
            trial("experts", measure_experts, results["experts"], deadline)
            print(
                table(EXPERT_COLUMNS, [[row[column] for column in EXPERT_COLUMNS] for row in results["experts"]]),
                flush=True,
            )
        elif part == "quantize":
            results["quantize"] = []
            trial("quantize", measure_quantize, results["quantize"], options.model, deadline)
        else:
            results["generate"] = {}
            sizes = (options.model, options.layers, options.tokens)
            trial("generate", measure_generate, results["generate"], *sizes, deadline)
    results["seconds"] = time.perf_counter() - begin
    machine.save(options.name, results)
    for part, error in results.get("errors", {}).items():
        print(f"FAILED {part}: {error}", file=sys.stderr)
    return 1 if "errors" in results else 0


if __name__ == "__main__":
    sys.exit(main())
