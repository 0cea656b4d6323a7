"""The time of quantizing on a GPU, on paper: instructions, products and bytes, at the published speeds of two cards.

    PYTHONPATH=.:kernels/torch-ext python kernels/benchmarks/budgets.py

Nothing here is measured on a device. Instructions of the encoder are counted in its compiled code (`instructions`),
products and bytes in the loops of `transformers_quip/rounding` and `transformers_quip/quantize`. A card is assumed to reach
the shares below of its published speeds, and a launch to take `LAUNCH` seconds with nothing beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from instructions import inspect
from specimens_nearest import ROWS, WARPS

from quip_kernels.nearest import TOGETHER, candidates
from transformers_quip.codebooks.base import PANEL

# Shares of the published speeds: of matrix products, of memory, and of instruction slots.
PRODUCTS, MEMORY, ISSUE = 0.5, 0.7, 0.35
LAUNCH = 6e-6
# Launches of a panel: slices, the difference, two products, the encoder, the comparison and the copies of its results.
LAUNCHES = 24
SWEEPS = 10
# Sides of the lattice, and groups of candidates, in the loops of the encoder.
ROUNDS = 2, candidates(torch.device("cpu")).ends[2] // TOGETHER
BLOCK = 8
TOKENS = 256 * 2048
# Bytes for each entry of a Hessian and of a weight while a group is rounded, as the plan of a run counts them.
HESSIAN_BYTES, WEIGHT_BYTES = 40, 32


@dataclass(frozen=True)
class Card:
    """A GPU: multiprocessors, their clock in Hz, bytes a second of memory and bus, operations a second."""

    name: str
    target: str
    processors: int
    clock: float
    memory: float
    bus: float
    single: float
    double: float
    half: float


CARDS = (
    Card("H100 SXM", "sm_90", 132, 1.6e9, 3.35e12, 50e9, 67e12, 34e12, 989e12),
    Card("RTX 4090", "sm_89", 128, 2.2e9, 1.01e12, 25e9, 82e12, 1.29e12, 165e12),
)


def encode_seconds(card: Card, rows: int, columns: int, instructions: int) -> float:
    """All panels of a matrix, once. A program has `ROWS` rows; `instructions` are those of one of its warps for a block."""
    warps = -(-rows // ROWS) * WARPS
    slots = card.processors * 4 * card.clock * ISSUE
    # each block of a panel waits for the one before: at least the latency of its dependent instructions, at 4 cycles each
    waiting = instructions * 4 / card.clock
    return columns / BLOCK * max(warps * instructions / slots, waiting)


def group_seconds(card: Card, rows: int, columns: int, instructions: int) -> dict[str, float]:
    """Rounding the rows of all linears that read one input: LDLQ and the sweeps, with the factorisations before."""
    panels = columns / PANEL
    passes = 1 + SWEEPS
    single = 2 * rows * columns**2 * (0.5 + SWEEPS)  # the first pass has, on average, half of the errors
    moved = 4 * rows * columns * panels * 4 * (0.5 + SWEEPS)  # weight and points are read, their difference twice
    # Cholesky factors for damping, for the scales and for rounding, each n³ / 3, and a triangular product for the factor
    double = 2 * 3 * columns**3 / 3
    # rows on which four scales are tried with two sweeps
    sample = 4 * min(rows, 3 * 128)
    single += 2 * sample * columns**2 * 2.5
    # Hessian: transforms of both sides, damping, a condition number by 40 products with vectors
    moved += 4 * columns**2 * 100
    return {
        "encoder": passes * encode_seconds(card, rows, columns, instructions)
        + 3 * encode_seconds(card, sample, columns, instructions),
        "products": single / (card.single * PRODUCTS),
        "memory": moved / (card.memory * MEMORY),
        "factors": double / (card.double * PRODUCTS),
        "launches": panels * (passes + 3) * LAUNCHES * LAUNCH,
    }


# Llama-3-8B: rows and columns of the groups of a block, and their input's width.
GROUPS = ((4096 + 2 * 1024, 4096), (4096, 4096), (2 * 14336, 4096), (4096, 14336))
BLOCKS, HIDDEN, OUTSIDE, BLOCK_BYTES = 32, 4096, 2 * 128256 * 4096 * 2, 218e6 * 2


def model_seconds(card: Card, instructions: int) -> dict[str, float]:
    """An 8-billion-parameter model with `TOKENS` tokens: every block is run with Hessians, rounded, and run again."""
    weights = sum(rows * columns for rows, columns in GROUPS)
    forward = 2 * TOKENS * weights + 4 * TOKENS * 2048 * HIDDEN
    hessians = sum(TOKENS * columns**2 for _, columns in GROUPS)  # one triangle
    # sums in float64 are read and written for every 4096 tokens, and products in float32 with them
    moved = sum(columns**2 / 2 * (8 + 8 + 4 + 4) * TOKENS / 4096 for _, columns in GROUPS)
    rounding = [sum(group_seconds(card, *group, instructions).values()) for group in GROUPS]
    return {
        "text through the blocks, twice": BLOCKS * 2 * forward / (card.half * PRODUCTS),
        "Hessians": BLOCKS * (hessians / (card.single * PRODUCTS) + moved / (card.memory * MEMORY)),
        "rounding": BLOCKS * sum(rounding),
        "hidden states to the CPU and back, twice": BLOCKS * 4 * TOKENS * HIDDEN * 2 / card.bus,
    }


def model_bytes() -> dict[str, float]:
    """Memory of the GPU at the peak, one block at a time (`--device-map cuda:0`)."""
    return {
        "outside of the blocks": OUTSIDE,
        "one block": BLOCK_BYTES,
        "sums of the Hessians": sum(8 * columns**2 for _, columns in GROUPS),
        "rounding of the largest group": max(HESSIAN_BYTES * n**2 + WEIGHT_BYTES * m * n for m, n in GROUPS),
    }


def show(title: str, parts: dict[str, float], unit: str, budget: float) -> None:
    total = sum(parts.values())
    print(f"\n{title}: {total:.3g} {unit} of {budget:g}")
    for name, value in parts.items():
        print(f"  {name:42} {value:8.3g} {unit}")


def main() -> None:
    for card in CARDS:
        report = inspect("panel one stage", card.target)
        instructions = report.executed(*ROUNDS)
        print(f"\n== {card.name}: {instructions} instructions of a warp for {ROWS} rows of a block")
        show("a 4096x4096 layer with 10 sweeps", group_seconds(card, 4096, 4096, instructions), "s", 2)
        minutes = {name: seconds / 60 for name, seconds in model_seconds(card, instructions).items()}
        show("an 8B model, 256 x 2048 tokens", minutes, "min", 30)
    show("its memory", {name: count / 1e9 for name, count in model_bytes().items()}, "GB", 24)


if __name__ == "__main__":
    main()
