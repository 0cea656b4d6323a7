"""Draws the pictures of how_it_works.md with the code that they are about: python docs/pictures.py"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from matplotlib.figure import Figure

from transformers_quip import codebooks, incoherence

FOLDER = Path(__file__).resolve().parent / "pictures"


def draw_incoherence() -> None:
    """A weight with large columns, before and after both transforms."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(512, 512, generator=generator)
    weight[:, ::64] *= 12
    q_in, q_out = (incoherence.get("hadamard", 512, seed) for seed in (0, 1))
    signs = [torch.randint(0, 2, (512,), generator=generator) * 2.0 - 1 for _ in range(2)]
    rotated = q_in.apply_transpose(weight * signs[0])
    rotated = q_out.apply_transpose(rotated.T.contiguous() * signs[1]).T
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    bins = torch.linspace(-5, 5, 101).tolist()
    for values, color, label in ((weight, "#aaaaaa", "before"), (rotated, "#3465a4", "after")):
        scaled = (values / values.square().mean().sqrt()).flatten().tolist()
        axes.hist(scaled, bins, density=True, color=color, alpha=0.75, label=label)
    xs = [i / 20 for i in range(-100, 101)]
    axes.plot(xs, [math.exp(-x * x / 2) / math.sqrt(2 * math.pi) for x in xs], color="black", linewidth=1)
    axes.set(xlabel="weight / root mean square", ylabel="density", xlim=(-5, 5))
    axes.legend()
    figure.savefig(FOLDER / "incoherence.svg", metadata={"Date": None})


def codebook_error() -> float:
    """Mean squared error of E8P on normal numbers, at its published scale."""
    book = codebooks.get("e8p")
    values = torch.randn(1 << 15, book.block_size, generator=torch.Generator().manual_seed(0))
    _, points = book.encode(values * book.gaussian_scale)
    return (points / book.gaussian_scale - values).square().mean().item()


def scalar_error() -> float:
    """The least mean squared error of four values on normal numbers (Lloyd and Max: ±0.4528, ±1.510)."""
    edge, inner, outer = 0.9816, 0.4528, 1.5104
    xs = torch.linspace(-8, 8, 400001, dtype=torch.float64)
    density = torch.exp(-xs.square() / 2) / math.sqrt(2 * math.pi)
    nearest = torch.where(xs.abs() < edge, inner, outer) * xs.sign()
    return torch.trapezoid((xs - nearest).square() * density, xs).item()


def draw_codebooks() -> tuple[float, float]:
    """Bars of the errors, with the least possible error of two bits: 2⁻⁴ of the variance."""
    e8p, scalar = codebook_error(), scalar_error()
    figure = Figure(figsize=(7, 2), layout="constrained")
    axes = figure.subplots()
    names = ["four values", "E8P", "limit"]
    axes.barh(names, [scalar, e8p, 2**-4], color=["#aaaaaa", "#3465a4", "#dddddd"])
    axes.invert_yaxis()
    axes.set(xlabel="mean squared error of 2-bit codes, variance 1")
    figure.savefig(FOLDER / "codebooks.svg", metadata={"Date": None})
    return e8p, scalar


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    draw_incoherence()
    print("mean squared errors: E8P {:.4f}, four values {:.4f}".format(*draw_codebooks()))
