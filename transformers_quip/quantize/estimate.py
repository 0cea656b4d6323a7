"""The memory, the disk and the time of a run before it starts: from shapes, and two timed samples of the first block."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .. import rounding
from ..calibration import capture_inputs, find_blocks, processes
from ..calibration.experts import BUDGET
from ..calibration.precision import fast_cpu_linears
from ..config.bits import mixed_bits
from ..nn import replace
from ..text import duration, size
from .block import observe_block, rounding_bytes
from .gradients import seconds_and_bytes, two_sided
from .layer import quantize_weights
from .plan import QuantizationPlan
from .residence import IN_MEMORY, Residence

if TYPE_CHECKING:
    from ..config import QuipConfig

# Rows in the two samples of rounding: their difference is the time for rows, the rest is the time for a Hessian.
_FEW, _MORE = 64, 192
# Documents that are written at once, at most (`calibration.synthetic`).
WRITTEN = 256


@dataclass(frozen=True)
class Group:
    """Linears that read one input.

    Attributes:
        names: inside their block.
        columns: of each weight.
        rows: of all weights together.
    """

    names: tuple[str, ...]
    columns: int
    rows: int


@dataclass(frozen=True)
class Sample:
    """What was timed: one batch through the first block, and the rounding of some rows.

    Attributes:
        observe: seconds for one batch, with Hessians.
        replay: seconds for one batch without.
        write: seconds for one token of `WRITTEN` documents.
        columns: of the weight whose rows were rounded.
        row: seconds for each further row.
        hessian: seconds for the rest, of a group with this number of columns.
    """

    observe: float
    replay: float
    write: float
    columns: int
    row: float
    hessian: float

    def rounding(self, group: Group) -> float:
        """Seconds for rounding a group: rows cost as the square of their length, a Hessian as its third power."""
        ratio = group.columns / self.columns
        return self.row * group.rows * ratio**2 + self.hessian * ratio**3


def groups_of(names_of: Mapping[str, Sequence[str]], shapes: Mapping[str, tuple[int, int]]) -> list[Group]:
    """The groups of a block, from leaders and members as `BlockHessians.groups` has them, and from shapes by name."""
    return [
        Group(tuple(members), shapes[leader][1], sum(shapes[name][0] for name in members))
        for leader, members in names_of.items()
    ]


@torch.no_grad()
def time_samples(
    model: Any,
    plan: QuantizationPlan,
    config: QuipConfig,
    tokens: int,
    residence: Residence = IN_MEMORY,
) -> tuple[Sample, list[Group]]:
    """Time one batch of random tokens through the first block with something to quantize, and a rounding in it.

    Args:
        model: dense.
        plan: of the modules.
        config: `batch_size` and the options of rounding are read.
        tokens: in a sequence.
        residence: where the weights are.

    Returns:
        The times, and the groups of that block.
    """
    blocks_name, blocks = find_blocks(model)
    index = next(index for index in range(len(blocks)) if _linears(plan, f"{blocks_name}.{index}."))
    prefix = f"{blocks_name}.{index}."
    names = _linears(plan, prefix)
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(vocabulary, (config.batch_size, tokens), generator=torch.Generator().manual_seed(0))
    inputs = capture_inputs(model, blocks, ids, config.batch_size, progress=False).of_block(index)
    first = torch.randint(vocabulary, (WRITTEN, 1), generator=torch.Generator().manual_seed(0))
    writing = capture_inputs(model, blocks, first, WRITTEN, progress=False).of_block(index)
    with residence.part(prefix):
        block = blocks[index]
        with fast_cpu_linears(block):
            writing.call(block, 0)
            started = time.perf_counter()
            writing.call(block, 0)
            written = time.perf_counter() - started
        inputs.call(block, 0)
        begin = time.perf_counter()
        inputs.call(block, 0)
        replayed = time.perf_counter()
        hessians = observe_block(block, names, inputs, prefix)
        observed = time.perf_counter()
        shapes = {name: replace.linear_shape(block.get_submodule(name)) for name in names}
        groups = groups_of(hessians.groups, shapes)
        smallest = min(groups, key=lambda group: group.columns)
        leader = smallest.names[0]
        hessian, weight = hessians.accumulators[leader].hessian(), replace.dense_weight(block.get_submodule(leader))
        hessian.diagonal().add_(hessian.diagonal().mean())  # of full rank, whatever the number of tokens
        own = _sampled(config.for_module(prefix + leader))
        seconds = []
        for rows in (_FEW, _FEW, _MORE):  # the first one makes tables
            started = time.perf_counter()
            quantize_weights({leader: weight[:rows]}, hessian, own)
            seconds.append(time.perf_counter() - started)
    row = max(seconds[2] - seconds[1], 0.0) / max(min(_MORE, len(weight)) - min(_FEW, len(weight)), 1)
    fixed = max(seconds[1] - row * min(_FEW, len(weight)), 0.0)
    return Sample(observed - replayed, replayed - begin, written, smallest.columns, row, fixed), groups


def _linears(plan: QuantizationPlan, prefix: str) -> list[str]:
    """The linears of a block to quantize, without its experts."""
    stacks = set(plan.stacks)
    return [name for name in plan.inside(prefix) if prefix + name not in stacks]


def _sampled(config: QuipConfig) -> QuipConfig:
    """The options of a sample: the fewest bits of an average, and no rounding method that needs gradients."""
    config = copy.copy(config)
    if config.is_mixed:
        config.update(bits=mixed_bits(config.bits, config.codebook)[0])
    if rounding.get(config.rounding).two_sided:
        config.update(rounding="ldlq")
    return config


def peak_of_block(groups: Sequence[Group], dense: int) -> int:
    """The bytes of memory that a block takes: its dense weights, its Hessians, and the rounding of its largest group.

    Args:
        groups: of its linears.
        dense: bytes of its weights.
    """
    sums = [8 * group.columns**2 for group in groups]
    rounding = [sum(sums[number + 1 :]) + rounding_bytes(group.rows, group.columns) for number, group in enumerate(groups)]
    return dense + max(sum(sums), *rounding, 0)


@dataclass(frozen=True)
class Estimate:
    """What a run needs, from samples of its first block.

    Attributes:
        memory: bytes at the peak, those that the process has already included.
        disk: bytes while the run goes on.
        stages: seconds of each stage: "text", "gradients", "observe and replay", "round".
    """

    memory: int
    disk: int
    stages: dict[str, float]

    def sentences(self) -> str:
        """For the user, before the run."""
        parts = ", ".join(f"{name} {duration(seconds)}" for name, seconds in self.stages.items() if seconds)
        return (
            f"Memory: about {size(self.memory)} at the peak. Disk: about {size(self.disk)} while it runs. "
            f"Time: about {duration(sum(self.stages.values()))} ({parts}), from two timed samples."
        )


def estimate(
    model: Any,
    plan: QuantizationPlan,
    config: QuipConfig,
    shape: tuple[int, int],
    written: int,
    memory_now: int,
    residence: Residence = IN_MEMORY,
) -> Estimate:
    """Estimate a calibrated run.

    Args:
        model, plan, config, residence: see [`time_samples`].
        shape: (sequences, tokens) of the calibration data.
        written: tokens in a document that the model writes itself; 0 where the text is given.
        memory_now: bytes that the process has, with the tensors outside of the blocks.
    """
    sample, groups = time_samples(model, plan, config, shape[1], residence)
    blocks_name, blocks = find_blocks(model)
    alike = {name: group for group in groups for name in group.names}
    batches = -(-shape[0] // config.batch_size)
    following = {"dense": 0, "quantized": batches, "mixed": -(-batches // 2)}[config.calibrate_on]
    stages = {"text": 0.0, "gradients": 0.0, "observe and replay": 0.0, "round": 0.0}
    peak = largest = in_blocks = 0
    for index, block in enumerate(blocks):
        prefix = f"{blocks_name}.{index}."
        shapes = {name: replace.linear_shape(block.get_submodule(name)) for name in _linears(plan, prefix)}
        known = {name: alike[name].names[0] if name in alike else name for name in shapes}
        leaders = {leader: [name for name in shapes if known[name] == leader] for leader in dict.fromkeys(known.values())}
        own = groups_of({members[0]: members for members in leaders.values()}, shapes)
        dense = sum(tensor.nbytes for tensor in block.state_dict().values())
        in_blocks += dense
        stages["observe and replay"] += sample.observe * batches + sample.replay * following
        stacks = [entry.shape for entry in plan.entries if entry.name in plan.stacks and entry.name.startswith(prefix)]
        stages["round"] += sum(map(sample.rounding, own))
        stages["round"] += sum(count * sample.rounding(Group((), columns, rows)) for count, rows, columns in stacks)
        if own or stacks:
            of_experts = min(BUDGET, sum(8 * count * columns**2 for count, _, columns in stacks))
            peak, largest = max(peak, peak_of_block(own, dense) + of_experts), max(largest, dense)
    if written:
        rounds = -(-(shape[0] * shape[1]) // (written * WRITTEN))
        stages["text"] = rounds * written * len(blocks) * sample.write
    asked = set(two_sided(plan, config))
    needed = [(entry.shape[0], entry.shape[1]) for entry in plan.entries if entry.name in asked]
    if needed:
        forward = sample.replay * len(blocks) / config.batch_size
        products = config.batch_size * shape[1] * sum(group.columns**2 for group in groups)
        multiply = max(sample.observe - sample.replay, 0.0) / products
        stages["gradients"], sums = seconds_and_bytes(needed, config, shape[1], forward, multiply)
    else:
        sums = 0
    width = model.get_input_embeddings().embedding_dim
    hidden = shape[0] * shape[1] * width * next(model.parameters()).element_size()
    packed = sum(entry.packed_bytes for entry in plan.entries)
    left = sum(tensor.nbytes for tensor in model.state_dict().values()) - largest * len(blocks)
    stages = {stage: seconds / (1 if stage == "gradients" else processes.count()) for stage, seconds in stages.items()}
    peak = max(peak, in_blocks) + sums if needed else peak
    return Estimate(memory_now + peak + hidden, 2 * packed + max(left, 0) + 2 * hidden + sums, stages)
