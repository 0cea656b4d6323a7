"""What quantizing well-known models from folder to folder takes, on paper: memory, disk, time on CPU cores.

    python benchmarks/large_models.py

Shapes are those of the models' config.json. Bytes follow docs/large_models.md. Seconds follow three figures that were
measured on one core of an AMD EPYC (Zen 5, AVX-512 with BF16): the speed of forward passes and Hessians in
results/streaming.json, and the rounding of rows of 1024 to 4096 Gaussian numbers with LDLQ and 10 sweeps, which grows
with the length of the row. Longer rows are extrapolated. Nothing of this is measured on these models.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers_quip.calibration.experts import BUDGET
from transformers_quip.quantize import estimate

BITS = 2
TOKENS = 256 * 512
# One core: products of forward passes and Hessians per second; seconds for a weight in a row of n numbers; for a Hessian.
FLOPS = 110e9
WEIGHT = (0.25e-6, 0.4e-9)
HESSIAN = 1.1e-10


@dataclass(frozen=True)
class Group:
    """Linears of a block that read one input of n numbers.

    Attributes:
        columns: n.
        rows: of all of them together.
        copies: the number of such groups, one for each expert.
        share: of all tokens that reach it.
    """

    columns: int
    rows: int
    copies: int = 1
    share: float = 1.0

    @property
    def weights(self) -> int:
        return self.columns * self.rows * self.copies


@dataclass(frozen=True)
class Model:
    """A model as lists of different blocks.

    Attributes:
        blocks: (number of such blocks, their groups).
        outside: weights outside of the blocks.
        hidden: numbers in a hidden state.
    """

    name: str
    blocks: tuple[tuple[int, tuple[Group, ...]], ...]
    outside: int
    hidden: int

    @property
    def weights(self) -> int:
        return sum(count * sum(group.weights for group in groups) for count, groups in self.blocks)


def llama(name: str, hidden: int, intermediate: int, blocks: int, narrow: int, vocabulary: int) -> Model:
    groups = (
        Group(hidden, hidden + 2 * narrow),
        Group(hidden, hidden),
        Group(hidden, 2 * intermediate),
        Group(intermediate, hidden),
    )
    return Model(name, ((blocks, groups),), 2 * hidden * vocabulary, hidden)


def experts(hidden: int, intermediate: int, count: int, chosen: int) -> tuple[Group, Group]:
    share = chosen / count
    return Group(hidden, 2 * intermediate, count, share), Group(intermediate, hidden, count, share)


_LATENT = (Group(7168, 1536 + 576), Group(1536, 24576), Group(512, 32768), Group(16384, 7168))
MODELS = (
    llama("Llama-3.1-8B", 4096, 14336, 32, 1024, 128256),
    llama("Llama-3.1-70B", 8192, 28672, 80, 1024, 128256),
    llama("Llama-3.1-405B", 16384, 53248, 126, 1024, 128256),
    Model(
        "Qwen3-30B-A3B",
        ((48, (Group(2048, 4096 + 2 * 512), Group(4096, 2048), *experts(2048, 768, 128, 8))),),
        2 * 2048 * 151936,
        2048,
    ),
    Model(
        "DeepSeek-V3, as bfloat16",
        (
            (3, (*_LATENT, Group(7168, 2 * 18432), Group(18432, 7168))),
            (58, (*_LATENT, *experts(7168, 2048, 256, 8), Group(7168, 2 * 2048), Group(2048, 7168))),
        ),
        2 * 7168 * 129280,
        7168,
    ),
)


def rounding_bytes(model: Model) -> int:
    """What a block takes besides its weights, see `estimate.peak_of_block`; with the budget for the Hessians of experts."""
    largest = 0
    for _, groups in model.blocks:
        stacked = min(BUDGET, sum(8 * group.copies * group.columns**2 for group in groups if group.copies > 1))
        single = [estimate.Group((), group.columns, group.rows) for group in groups if group.copies == 1]
        largest = max(largest, stacked + estimate.peak_of_block(single, dense=0))
    return largest


def core_hours(model: Model) -> tuple[float, float]:
    """(forward passes and Hessians, rounding) on one core."""
    products = seconds = 0.0
    for count, groups in model.blocks:
        for group in groups:
            tokens = TOKENS * group.share
            # every batch once with Hessians, of which one triangle is computed, and half of them again
            products += count * tokens * (1.5 * 2 * group.weights + group.copies * group.columns**2)
            seconds += count * group.weights * (WEIGHT[0] + WEIGHT[1] * group.columns)
            seconds += count * group.copies * HESSIAN * group.columns**3
    return products / FLOPS / 3600, seconds / 3600


def main() -> None:
    titles = ["model", "dense", "outside", "one block", "rounding", "memory", "result", "disk", "observe h", "round h"]
    print(" | ".join(titles))
    for model in MODELS:
        outside, packed = 2 * model.outside, model.weights * (BITS + 0.01) / 8
        block = max(2 * sum(group.weights for group in groups) for _, groups in model.blocks)
        hidden = 2 * TOKENS * model.hidden
        rounding = rounding_bytes(model)
        memory, disk = outside + block + rounding + hidden, 2 * packed + outside + 2 * hidden
        sizes = (2 * model.weights + outside, outside, block, rounding, memory, packed + outside, disk)
        shown = [f"{size / 1e9:.1f} GB" for size in sizes]
        print(" | ".join([model.name, *shown, *(f"{hours:.0f}" for hours in core_hours(model))]))


if __name__ == "__main__":
    main()
