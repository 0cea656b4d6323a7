"""A small mixture of experts, trained here for some minutes and then quantized: its experts stacked, and unrolled.

    python benchmarks/mixture.py [--steps 400] [--folder .cache/mixture]

A Mixtral of 10.6 million parameters (8 experts, 2 of them for a token) learns to predict bytes of the Wikipedia articles in
protocol.py. Perplexities are those of a byte, on articles that it has not seen. "Unrolled" is the same model with a module
of nn.Linear for each expert, quantized as any linear. "Experts dense" leaves the experts in bfloat16.
"""

from __future__ import annotations

import argparse
import copy
import logging
import time
from pathlib import Path

import machine
import protocol
import torch
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from transformers_quip import QuipConfig
from transformers_quip.calibration import experts as calibration
from transformers_quip.nn.experts import QuipExperts
from transformers_quip.nn.replace import quantized_modules
from transformers_quip.quantize.recipe import quantize_model

LENGTH = 256
CONFIG = {
    "vocab_size": 256,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": LENGTH,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "router_aux_loss_coef": 0.02,
    "output_router_logits": True,
}
WINDOWS = 40


class Unrolled(nn.Module):
    """Experts as modules of linears, each called with its own tokens."""

    def __init__(self, stacked: nn.Module):
        super().__init__()
        self.act_fn = stacked.act_fn
        hidden, inner = stacked.down_proj.shape[1:]
        self.experts = nn.ModuleList(
            nn.ModuleDict(
                {
                    "gate_proj": nn.Linear(hidden, inner, bias=False),
                    "up_proj": nn.Linear(hidden, inner, bias=False),
                    "down_proj": nn.Linear(inner, hidden, bias=False),
                }
            )
            for _ in range(stacked.num_experts)
        )
        for index, expert in enumerate(self.experts):
            expert["gate_proj"].weight.data, expert["up_proj"].weight.data = stacked.gate_up_proj.data[index].chunk(2)
            expert["down_proj"].weight.data = stacked.down_proj.data[index].clone()

    def forward(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        result = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            tokens, choice = torch.where(chosen == index)
            if len(tokens):
                y = expert["down_proj"](self.act_fn(expert["gate_proj"](x[tokens])) * expert["up_proj"](x[tokens]))
                result.index_add_(0, tokens, (y * weights[tokens, choice, None]).to(result.dtype))
        return result


def texts() -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes of the articles for training and of the others, each [windows, LENGTH]."""
    articles = protocol.wikipedia_articles()
    cut = int(len(articles) * protocol.CALIBRATION_SHARE)
    parts = []
    for chosen in (articles[:cut], articles[cut:]):
        data = torch.frombuffer(bytearray("\n\n".join(chosen).encode()), dtype=torch.uint8).long()
        parts.append(data[: len(data) - len(data) % LENGTH].view(-1, LENGTH))
    return parts[0], parts[1][:: max(len(parts[1]) // WINDOWS, 1)][:WINDOWS]


def train(data: torch.Tensor, steps: int, folder: Path) -> None:
    """Train the model and save it."""
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**CONFIG))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(0)
    started = time.perf_counter()
    for step in range(steps):
        ids = data[torch.randint(len(data), (8,), generator=generator)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.3f}, {time.perf_counter() - started:.0f} s", flush=True)
    model.config.output_router_logits = False
    model.save_pretrained(folder)


@torch.no_grad()
def perplexity(model: nn.Module, windows: torch.Tensor) -> float:
    """Of a byte."""
    losses = [model(input_ids=part, labels=part).loss.item() * len(part) for part in windows.split(8)]
    return float(torch.tensor(sum(losses) / len(windows)).exp())


def packed_bytes(model: nn.Module) -> int:
    """Bytes of a checkpoint whose dense tensors are bfloat16, and whose scales are, too."""
    total = 0
    for parameter in model.parameters():
        total += parameter.numel() * (parameter.element_size() if not parameter.is_floating_point() else 2)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--folder", type=Path, default=Path(".cache/mixture"))
    parser.add_argument("--sweeps", type=int, default=2)
    options = parser.parse_args()
    logging.getLogger("transformers_quip").setLevel(logging.ERROR)
    training, held_out = texts()
    if not (options.folder / "config.json").is_file():
        train(training, options.steps, options.folder)
    dense = AutoModelForCausalLM.from_pretrained(options.folder).eval()
    reference = perplexity(dense, held_out)
    print(f"dense: {reference:.3f}, {sum(p.numel() for p in dense.parameters()):,} parameters")
    drawn = training[torch.randperm(len(training), generator=torch.Generator().manual_seed(1))]
    rows = []

    def run(name: str, bits: float, windows: int = 128, unrolled: bool = False, **more) -> None:
        model = copy.deepcopy(dense)
        if unrolled:
            for layer in model.model.layers:
                layer.mlp.experts = Unrolled(layer.mlp.experts)
        config = QuipConfig(bits=bits, dataset=drawn[:windows], refinement_sweeps=options.sweeps, batch_size=16, **more)
        started = time.perf_counter()
        quantize_model(model, config, data=(drawn[:windows], "bytes"))
        seconds = time.perf_counter() - started
        stacked = any(isinstance(module, QuipExperts) for module in quantized_modules(model).values())
        row = {"model": name, "bits": bits, "windows": windows, "perplexity": perplexity(model, held_out)}
        row |= {"bytes": packed_bytes(model), "seconds": seconds, "stacked": stacked}
        rows.append(row)
        ratio = row["perplexity"] / reference
        machine.save("mixture", {"steps": options.steps, "sweeps": options.sweeps, "dense": reference, "rows": rows})
        print(f"{name}, {bits} bits, {windows} windows: {row['perplexity']:.3f} ({ratio:.3f}x), {row['bytes']:,} bytes, "
              f"{seconds:.0f} s", flush=True)  # fmt: skip

    for bits in (2, 4):
        run("stacked", bits)
        run("unrolled", bits, unrolled=True)
    run("stacked", 3)
    run("experts dense", 2, modules_to_not_convert=[r".*\.experts"])
    usual = calibration.BORROWED
    for windows in (2, 16):  # tokens for an expert: a quarter of 256 times these
        for share in (0.0, usual, 4 * usual):
            calibration.BORROWED = share
            run(f"borrowing {share:g}", 2, windows)
    calibration.BORROWED = usual


if __name__ == "__main__":
    main()
