"""The calibrated recipe: block by block through a model, with the memory of one block in addition to the model's."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..calibration import BlockInputs, CapturedInputs, NotBlockByBlock, capture_inputs, find_block_lists
from ..calibration.curvature import Curvature
from ..calibration.dataset import load_data
from ..calibration.device import execution_device
from ..calibration.inputs import GivenInputs, counts, split
from ..calibration.precision import calibration_autocast, cpu_matmul_precision
from ..nn import replace
from ..text import duration
from .bars import advance
from .block import BlockResult, ModuleResult, Tuner, quantize_block, quantize_group, replayed_densely, timed
from .embedding import quantize_embedding
from .experts import few_tokens, place_experts
from .gradients import curvature_of, two_sided
from .layer import quantize_weight
from .mixed_bits import hessian_after_blocks, settle_bits
from .plan import check_device, make_plan
from .residence import IN_MEMORY, Residence
from .stack import quantize_stack
from .tensor_parallel import settle_transforms

if TYPE_CHECKING:
    from ..config import QuipConfig

logger = logging.getLogger(__name__)

# The name of the part that the embeddings are; all others are prefixes of modules.
EMBEDDINGS = "embeddings"


@dataclass
class QuantizationReport:
    """The result of a calibrated run.

    Attributes:
        data: the text that was used, as a sentence.
        tokens: their number.
        config: the final config: the caller's, with the bits of each module if an average was asked for, and with
            `calibration`, a record of the data and of the mean relative error. It does not hold the data itself.
        modules: a record for each quantized module, see [`ModuleResult.record`].
        seconds: wall time of each stage: "data", "allocate", "capture", "gradients", "observe", "round", "replay", "tune".
        tuning: the result of tuning afterwards (`finetune.TuneReport`) as a dictionary with its "history"; None without.
    """

    data: str
    tokens: int
    config: QuipConfig
    modules: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    tuning: dict[str, Any] | None = None

    @property
    def mean_relative_error(self) -> float:
        """The mean over the modules, each counted once; without those whose inputs were all zero, which have no error."""
        errors = [record["relative_error"] for record in self.modules if math.isfinite(record["relative_error"])]
        return sum(errors) / len(errors) if errors else 0.0


@torch.inference_mode(False)
@torch.no_grad()
def quantize_model(
    model: nn.Module,
    config: QuipConfig,
    tokenizer: Any = None,
    data: tuple[torch.Tensor | GivenInputs, str] | None = None,
    tuner: Callable[[BlockInputs], Tuner] | None = None,
    residence: Residence = IN_MEMORY,
) -> QuantizationReport:
    """Quantize the linears of a model's blocks, in place; and its embeddings, if the config names them.

    For each block in turn: Hessians from one pass over the calibration tokens, all its weights quantized, and the
    block replayed with them. In addition to the model, memory holds one block's Hessians and one set of hidden states (on
    the CPU).

    Args:
        model: dense, in memory or where `residence` says.
        config: the options; it is not changed.
        tokenizer: for a data set of text, before `config.tokenizer` and the model's own.
        data: the result of [`load_data`], if that was called before the model was loaded.
        tuner: makes an object that tunes a block while it is quantized, from the inputs of the block.
        residence: where the weights are; parts that an earlier run has finished are not quantized again.

    Returns:
        The result for each module, and the final config.

    Raises:
        ValueError: see [`make_plan`], [`load_data`] and [`quantize_weights`].
    """
    replace.leave_inference_mode(model)
    with cpu_matmul_precision("ieee"):
        return _quantize_model(model, config, tokenizer, data, tuner, residence)


def _quantize_model(
    model: nn.Module,
    config: QuipConfig,
    tokenizer: Any,
    data: tuple[torch.Tensor | GivenInputs, str] | None,
    tuner: Callable[[BlockInputs], Tuner] | None,
    residence: Residence,
) -> QuantizationReport:
    check_device(execution_device(model))
    plan = make_plan(model, config)
    config = settle_transforms(model, config, plan)
    started = perf_counter()
    ids, description = data or load_data(config, model, tokenizer)
    logger.info("Calibrating on %s.", description)
    sequences, tokens = counts(ids)
    report = QuantizationReport(description, tokens, config.without_data())
    report.seconds.update(residence.seconds())
    report.seconds["data"] += perf_counter() - started
    if config.is_mixed:
        with timed(report.seconds, "allocate"):
            if not isinstance(ids, torch.Tensor):
                raise ValueError(f"bits={config.bits} is an average, which is chosen on token ids: give token ids or texts")
            config = residence.settled(lambda: settle_bits(model, config, plan, ids, residence))
    lists = find_block_lists(model)
    if len(lists) > 1 and residence is not IN_MEMORY:
        raise ValueError(
            f"{type(model).__name__} has several lists of blocks ({', '.join(lists)}), which are quantized one after the "
            "other in memory alone: use from_pretrained"
        )
    batches = split(ids, config.batch_size)
    numbers = residence.batches(len(batches))
    own = [batches[number] for number in numbers]

    def captured(blocks: nn.ModuleList) -> CapturedInputs:
        with timed(report.seconds, "capture"):
            return capture_inputs(model, blocks, own, config.batch_size, progress=not residence.quiet)

    first, *others = lists.items()
    inputs = captured(first[1])
    curvature = {}
    if names := two_sided(plan, config):
        with timed(report.seconds, "gradients"):
            curvature = curvature_of(model, names, config, ids, residence)
    dense, following = _split_batches(numbers, config.calibrate_on)
    embeddings, borrowing = plan.embeddings, {}
    with tqdm(total=len(plan.names), desc="Quantizing", unit="layer", disable=residence.quiet) as bar:

        def done(module: ModuleResult) -> None:
            report.modules.append(module.record)
            advance(bar, module.name, module.quantized.statistics["relative_error"], report.mean_relative_error)

        def restored(prefix: str) -> bool:
            """Whether an earlier run has finished this part; its records join the report."""
            records = residence.restore(prefix)
            report.modules += records or []
            bar.update(len(records or []))
            return records is not None

        def finish(prefix: str, begin: int, inputs: CapturedInputs | None = None) -> None:
            residence.finish(prefix, report.modules[begin:], dict(report.seconds), inputs)

        def through(blocks_name: str, blocks: nn.ModuleList, inputs: CapturedInputs) -> None:
            """Quantize one list of blocks."""
            times: list[float] = []
            for index, block in enumerate(blocks):
                left = duration(sum(times) / len(times) * (len(blocks) - index)) if times else ""
                bar.set_description(f"Block {index + 1} of {len(blocks)}{left and f', {left} left'}")
                prefix, begin = f"{blocks_name}.{index}.", len(report.modules)
                if restored(prefix):
                    continue
                configs = {name: config.for_module(prefix + name) for name in plan.inside(prefix)}
                started = perf_counter()
                with residence.part(prefix):
                    result = _quantize_block(
                        block, index, inputs, configs, prefix, dense, following, done, tuner, curvature, residence.shared
                    )
                    borrowing.update(result.borrowing)
                    for stage, seconds in result.seconds.items():
                        report.seconds[stage] += seconds
                    finish(prefix, begin, inputs)
                times.append(perf_counter() - started)

        if embeddings:
            bar.set_description("Embeddings")
            if not restored(EMBEDDINGS):
                with timed(report.seconds, "round"):
                    quantize_embeddings(model, embeddings, config, done)
                finish(EMBEDDINGS, 0)
            again = captured(first[1])  # batches that follow the quantized model start here
            for batch in following:
                inputs.hidden[batch] = again.hidden[batch]
        through(*first, residence.inputs(inputs))
        for name, blocks in others:  # which read what the quantized ones before them compute
            try:
                inputs = captured(blocks)
            except NotBlockByBlock as error:
                logger.warning("%s: %s Its layers are quantized without calibration.", name, error)
                quantize_without_data(model, plan.inside(f"{name}."), f"{name}.", config, done)
                continue
            through(name, blocks, inputs)
        prefixes, heads = tuple(f"{name}." for name in lists), _outside_base(model)
        for name in plan.names:
            if not name.startswith(prefixes) and name not in embeddings:
                bar.set_description("After the blocks")
                begin = len(report.modules)
                if restored(name + "."):
                    continue
                if name not in heads:  # a tower, which the calibration data do not reach
                    with timed(report.seconds, "round"):
                        quantize_without_data(model, [name], "", config, done)
                    finish(name + ".", begin)
                    continue
                with timed(report.seconds, "observe"), residence.whole():
                    hessian = hessian_after_blocks(model, name, ids, config.batch_size)
                with timed(report.seconds, "round"):
                    _quantize_after_blocks(model, name, hessian, config, done)
                finish(name + ".", begin)
    if borrowing:
        logger.warning("%s.", few_tokens(borrowing))
    report.config = config.without_data()
    report.config.calibration = {
        "data": report.data,
        "sequences": sequences,
        "tokens": tokens,
        "mean_relative_error": round(report.mean_relative_error, 6),
    }
    return report


def _quantize_block(
    block: nn.Module,
    index: int,
    inputs: CapturedInputs,
    configs: dict[str, QuipConfig],
    prefix: str,
    dense: Sequence[int],
    following: Sequence[int],
    done: Callable[[ModuleResult], None],
    tuner: Callable[[BlockInputs], Tuner] | None,
    curvature: dict[str, Curvature],
    shared: bool,
) -> BlockResult:
    """Quantize one block and bring every batch to the next one; the seconds of that are added to the result's."""

    def keep(batch: int, output: torch.Tensor) -> None:
        if batch in dense:
            inputs.store(batch, output)

    entering = inputs.of_block(index)
    tuning = tuner(entering) if tuner is not None and configs else None
    own = {name: curvature.pop(prefix + name) for name in configs if prefix + name in curvature}
    result = quantize_block(block, entering, configs, prefix, keep, done, tuning, own, shared)
    if following and index + 1 < inputs.num_blocks:
        with timed(result.seconds, "replay"), calibration_autocast(block), replayed_densely(block, configs):
            inputs.advance(index, block, following)
    return result


def quantize_embeddings(
    model: nn.Module, names: Sequence[str], config: QuipConfig, done: Callable[[ModuleResult], None]
) -> None:
    """Quantize the tables of these embeddings; `done` gets each result."""
    for name in names:
        started = perf_counter()
        table, own = replace.dense_weight(model.get_submodule(name)), config.for_module(name)
        quantized = quantize_embedding(table, own, name)
        done(ModuleResult(name, (table.shape[0], table.shape[1]), quantized, perf_counter() - started))
        replace.replace_embedding(model, name, quantized, own)


def _outside_base(model: Any) -> set[str]:
    """The names of the output embeddings and of the heads outside the base model: they read what the blocks return."""
    find_output = getattr(model, "get_output_embeddings", None)
    output = None if find_output is None else find_output()
    base = {id(module) for module in getattr(model, "base_model", model).modules()}
    return {name for name, module in model.named_modules() if module is output or id(module) not in base}


def quantize_without_data(
    model: nn.Module, names: Sequence[str], prefix: str, config: QuipConfig, done: Callable[[ModuleResult], None]
) -> None:
    """Quantize the weights of linears and experts to the nearest points.

    Args:
        names: as [`QuantizationPlan.inside`] gives them for this prefix.
        done: gets each result.
    """
    parent = model.get_submodule(prefix.removesuffix(".")) if prefix else model
    configs = {name: config.for_module(prefix + name) for name in names}
    stacks = {name: stack for name, stack in replace.dense_stacks(parent).items() if name in configs}
    rounded = {}
    for name, own in configs.items():
        started, weight = perf_counter(), replace.weight_of(parent, name)
        if name in stacks:
            rounded[name] = quantize_stack(stacks[name].split(weight), own, prefix + name)
            done(ModuleResult(prefix + name, stacks[name].shape, rounded[name], perf_counter() - started))
        else:
            quantized = quantize_weight(weight, own, prefix + name)
            done(ModuleResult(prefix + name, (weight.shape[0], weight.shape[1]), quantized, perf_counter() - started))
            replace.replace_linear(parent, name, quantized, own)
    place_experts(parent, rounded, configs)


def _quantize_after_blocks(
    model: nn.Module, name: str, hessian: torch.Tensor, config: QuipConfig, done: Callable[[ModuleResult], None]
) -> None:
    """Quantize a linear that reads the output of the quantized blocks: the output embeddings."""
    configs = {name: config.for_module(name)}
    for module in quantize_group(model, (name,), hessian, configs).values():
        done(module)
        replace.replace_linear(model, name, module.quantized, configs[name])


def _split_batches(numbers: Sequence[int], calibrate_on: str) -> tuple[list[int], list[int]]:
    """The batches that follow the dense model, and those that follow the model quantized so far.

    Args:
        numbers: of the batches of this process among all of them; the result has their places in it.
        calibrate_on: of the config.
    """
    dense = {"dense": lambda _: True, "quantized": lambda _: False, "mixed": lambda number: number % 2 == 1}[calibrate_on]
    places = range(len(numbers))
    return [place for place in places if dense(numbers[place])], [place for place in places if not dense(numbers[place])]
