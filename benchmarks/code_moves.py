"""Whether gradients of a few hundred windows can improve the codes of a quantized model: PV-Tuning's largest moves.

    python benchmarks/code_moves.py QUANTIZED [--dense FOLDER] [--windows 32] [--shares 1e-5 1e-4 1e-3 1e-2]

The gradient of the KL divergence to the dense model with respect to every decoded weight is taken twice, over two disjoint
halves of the windows. Their cosine is the share of a half's gradient that is signal. Then blocks of weights (8 of E8P,
tiles of 256 of a trellis) move to a neighbouring point of the codebook, against the gradient of the first half: a share of
them, those with the largest predicted gain. The divergence is measured on windows of the first half, on windows of the
second half, and on other held-out ones; `predicted` is the gain to first order by the gradient of each half.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import machine
import torch
from protocol import load_windows
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from transformers_quip import codebooks
from transformers_quip.calibration.device import evaluating
from transformers_quip.finetune import record
from transformers_quip.finetune.codes import slope_of
from transformers_quip.finetune.end_to_end import student_head
from transformers_quip.finetune.guard import window_divergences
from transformers_quip.finetune.loss import divergence_of
from transformers_quip.nn.replace import quantized_linears

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
from smollm2 import dense_folder

HELD_OUT = 8
STEP = 0.8  # of the codebook's units: far enough to leave the cell of a point


class Layer:
    """A quantized linear of the model, and the dense linear that stands in for it."""

    def __init__(self, quantized: nn.Module):
        self.quantized, self.book = quantized, codebooks.get(quantized.codebook)
        self.points = quantized._decode(torch.float32)
        self.dense = nn.Linear(quantized.in_features, quantized.out_features, bias=False)
        self.before = quantized._weight_of(self.points).contiguous()
        self.dense.weight.data = self.before.clone()
        self.sums: list[torch.Tensor] = []

    def moves(self, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The neighbouring points in blocks [..., size], and the gain [...] that the gradient predicts for each block."""
        slope, old = (self.book.to_blocks(matrix) for matrix in (slope_of(self.quantized, gradient), self.points))
        wanted = old - STEP * slope / slope.norm(dim=-1, keepdim=True).clamp_min(1e-30)
        _, found = self.book.encode(wanted)
        return found, ((old - found) * slope).sum(-1)

    def moved(self, points: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """The weight [m, n] after these blocks have moved to these points."""
        old = self.book.to_blocks(self.points)
        points = self.book.from_blocks(torch.where(chosen[..., None], points, old))
        return self.quantized._weight_of(points).contiguous()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("quantized", type=Path)
    parser.add_argument("--dense", type=Path)
    parser.add_argument("--windows", type=int, default=32, help="of 512 tokens, in each half")
    parser.add_argument("--shares", type=float, nargs="+", default=[1e-5, 1e-4, 1e-3, 1e-2])
    options = parser.parse_args()
    folder = options.dense or dense_folder()
    count = 2 * options.windows + HELD_OUT
    # quantizing has read the first 256 windows, so others are taken
    ids = load_windows(AutoTokenizer.from_pretrained(folder), calibration=256 + count).calibration[256:]
    teacher = record(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), ids)
    model = AutoModelForCausalLM.from_pretrained(options.quantized)
    head = student_head(model, teacher, ids[:1, :8])
    layers = {name: Layer(one) for name, one in quantized_linears(model).items()}
    model.requires_grad_(False)
    for name, layer in layers.items():
        model.set_submodule(name, layer.dense)
    halves = [range(options.windows), range(options.windows, 2 * options.windows)]
    held_out = range(2 * options.windows, count)
    begin = time.process_time()
    with evaluating(model):
        for half in halves:
            for index in half:
                (divergence_of(model, teacher, head, [index]) / (len(half) * ids.shape[1])).backward()
            for layer in layers.values():
                layer.sums.append(layer.dense.weight.grad)
                layer.dense.weight.grad = None
    seconds = time.process_time() - begin

    def cosines(names: list[str]) -> float:
        pairs = [layers[name].sums for name in names]
        inner = sum((a * b).sum(dtype=torch.float64) for a, b in pairs)
        sizes = [sum(pair[i].square().sum(dtype=torch.float64) for pair in pairs) for i in (0, 1)]
        return (inner / (sizes[0] * sizes[1]).sqrt()).item()

    kinds = sorted({name.rsplit(".", 1)[-1] for name in layers})
    content = {
        "model": folder.name,
        "quantized": next(iter(layers.values())).book.name,
        "windows": options.windows,
        "cpu_seconds": seconds,
        "cosine": {kind: cosines([name for name in layers if name.endswith(kind)]) for kind in kinds},
        "cosine_of_all": cosines(list(layers)),
    }
    print(content, flush=True)

    def divergences() -> dict[str, float]:
        """Of the model as it is."""
        each = {"first half": halves[0][:HELD_OUT], "second half": halves[1][:HELD_OUT], "held out": held_out}
        return {name: window_divergences(model, teacher, head, chosen).mean().item() for name, chosen in each.items()}

    rows = [{"share": 0.0, **divergences()}]
    print(rows[-1], flush=True)
    found = {name: layer.moves(layer.sums[0]) for name, layer in layers.items()}
    gains = torch.cat([gain.flatten() for _, gain in found.values()])
    for share in options.shares:
        least = gains.kthvalue(max(1, round(len(gains) * (1 - share)))).values
        predicted = {"first": 0.0, "second": 0.0}
        for name, layer in layers.items():
            points, gain = found[name]
            moved = layer.moved(points, gain > least)
            for half, slope in zip(predicted, layer.sums, strict=True):
                predicted[half] -= ((moved - layer.before) * slope).sum(dtype=torch.float64).item()
            layer.dense.weight.data = moved
        rows.append({"share": share, "predicted": predicted, **divergences()})
        print(rows[-1], flush=True)
    machine.save("code_moves", content | {"rows": rows})


if __name__ == "__main__":
    main()
