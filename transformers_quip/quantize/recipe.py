"""The calibrated recipe: block by block through a model, with the memory of one block beside it."""

from __future__ import annotations

import copy
import logging
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm.auto import tqdm

from .. import codebooks
from ..calibration import BlockInputs, HessianAccumulator, capture_inputs, find_blocks, observe_linears
from ..calibration.dataset import load_token_ids
from ..calibration.device import autocast_dtype, calibration_autocast, cpu_matmul_precision, evaluating
from ..calibration.observe import observe_until
from ..config import MIXED_BITS
from ..nn import replace
from .allocate import allocate, gaussian_error, measure_sensitivities
from .bars import advance
from .embedding import quantize_embedding
from .layer import QuantizedWeight, loss_of_rounding, quantize_weight, quantize_weights
from .plan import make_plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..config import QuipConfig

logger = logging.getLogger(__name__)

# On how many tokens Hessians are measured where they only serve to choose bits.
_RATIO_TOKENS = 1 << 15


@dataclass
class QuantizationReport:
    """What a calibrated run did.

    Attributes:
        data: which text was used, as a sentence.
        tokens: how many.
        modules: a record for each quantized module: "name", "shape", "seconds", and the statistics of
            [`QuantizedWeight`].
        seconds: wall time of each stage: "data", "allocate", "capture", "observe", "round",
            "replay".
    """

    data: str
    tokens: int
    modules: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @property
    def mean_relative_error(self) -> float:
        """Over the modules, each counted once."""
        errors = [record["relative_error"] for record in self.modules]
        return sum(errors) / len(errors)


@torch.no_grad()
def quantize_model(
    model: PreTrainedModel, config: QuipConfig, tokenizer: Any = None, data: tuple[torch.Tensor, str] | None = None
) -> QuantizationReport:
    """Quantize the linears of a causal model's decoder blocks, in place; and its embeddings, where the config names them.

    For each block in turn: Hessians from one pass over the calibration tokens, all its weights quantized, and the
    block replayed with them. Beside the model, memory holds one block's Hessians and one set of hidden states (on the
    CPU).

    Args:
        model: dense, in memory.
        config: how; `config.calibration` is set to a record of the data that was used.
        tokenizer: for a data set of text, before `config.tokenizer` and the model's own.
        data: what [`load_token_ids`] returned, where that was called before the model was loaded.

    Returns:
        What was done to each module.

    Raises:
        ValueError: see [`make_plan`], [`load_token_ids`] and [`quantize_weights`].
    """
    with cpu_matmul_precision("ieee"):  # a Hessian rotated in lower precision is no longer positive definite
        return _Recipe(model, config, tokenizer, data).run()


class _Recipe:
    """One run over one model; see [`quantize_model`]."""

    def __init__(self, model: PreTrainedModel, config: QuipConfig, tokenizer: Any, data: tuple[torch.Tensor, str] | None):
        self.model = model
        self.config = config
        self.plan = make_plan(model, config)
        started = time.perf_counter()
        self.ids, description = data or load_token_ids(config, model, tokenizer)
        logger.info("Calibrating on %s.", description)
        self.report = QuantizationReport(description, self.ids.numel())
        self.report.seconds["data"] = time.perf_counter() - started
        if config.is_mixed:
            with self._timed("allocate"):
                self._allocate()

    def _allocate(self) -> None:
        """Give each module without bits of its own those that `config.bits` as an average allows."""
        entries = {e.name: e for e in self.plan.entries if e.quantized and self.config.for_module(e.name).is_mixed}
        sensitivities = measure_sensitivities(self.model, list(entries), self.ids, self.config.seed)
        for name, ratio in self._losses_of_rounding(entries).items():
            sensitivities[name] *= ratio
        errors = {bits: gaussian_error(codebooks.default_for_bits(bits)) for bits in MIXED_BITS}
        bits = allocate({n: e.parameters for n, e in entries.items()}, sensitivities, errors, self.config.bits)
        counts = ", ".join(f"{list(bits.values()).count(number)} with {number}" for number in MIXED_BITS)
        logger.info("bits=%s on the average: of %d modules %s bits.", self.config.bits, len(bits), counts)
        # Before what the caller set for patterns, which still holds: later ones win.
        modules = {name: {"bits": number} for name, number in bits.items()}
        for pattern, options in (self.config.modules or {}).items():
            modules[pattern] = modules.pop(pattern, {}) | options  # a pattern may be the name of one module
        self.config.modules = modules

    def _losses_of_rounding(self, names: Collection[str]) -> dict[str, float]:
        """For these linears, how much less errors of rounding matter than independent ones."""
        ids = self.ids[: max(_RATIO_TOKENS // self.ids.shape[1], 1)]
        name, blocks = find_blocks(self.model)
        inputs = capture_inputs(self.model, blocks, ids, self.config.batch_size)
        result = {}

        def add(chosen: Iterable[str], hessian: torch.Tensor) -> None:
            for config, alike in self._by_config(chosen):
                config = copy.copy(config)
                config.update(bits=MIXED_BITS[0])  # the ratio hardly depends on them
                weights = {n: replace.dense_weight(self.model.get_submodule(n)) for n in alike}
                result.update(loss_of_rounding(weights, hessian, config))

        for index, block in enumerate(tqdm(blocks, desc="Predicting losses", unit="block")):
            prefix = f"{name}.{index}."
            members = [entry.removeprefix(prefix) for entry in self.plan.names if entry.startswith(prefix)]
            hessians = _Hessians(prefix)
            with calibration_autocast(block):
                hessians.collect(block, index, members, inputs, range(inputs.num_batches))
            for leader, group in hessians.groups.items():
                add([prefix + member for member in group if prefix + member in names], hessians.pop(leader))
        for outside in (n for n in names if not n.startswith(f"{name}.")):
            if not replace.is_dense_embedding(self.model.get_submodule(outside)):  # whose rows see no feedback
                add([outside], self._hessian_after_blocks(outside, ids))
        return result

    def run(self) -> QuantizationReport:
        name, blocks = find_blocks(self.model)
        with self._timed("capture"):
            inputs = capture_inputs(self.model, blocks, self.ids, self.config.batch_size)
        self.bar = tqdm(total=len(self.plan.names), desc="Quantizing", unit="layer")
        with self.bar:
            embeddings = [n for n in self.plan.names if replace.is_dense_embedding(self.model.get_submodule(n))]
            if embeddings:
                self._quantize_embeddings(embeddings, blocks, inputs)
            for index, block in enumerate(blocks):
                self.bar.set_description(f"Block {index + 1} of {len(blocks)}")
                prefix = f"{name}.{index}."
                names = [entry.removeprefix(prefix) for entry in self.plan.names if entry.startswith(prefix)]
                self._quantize_block(block, index, prefix, names, inputs)
            for outside in (n for n in self.plan.names if not n.startswith(f"{name}.") and n not in embeddings):
                self.bar.set_description("After the blocks")
                self._quantize_after_blocks(outside)
        self.config.calibration = {
            "data": self.report.data,
            "sequences": self.ids.shape[0],
            "tokens": self.ids.numel(),
            "mean_relative_error": round(self.report.mean_relative_error, 6),
        }
        return self.report

    def _quantize_embeddings(self, names: list[str], blocks: nn.ModuleList, inputs: BlockInputs) -> None:
        """Quantize embeddings; the batches that follow the quantized model enter the first block from them."""
        self.bar.set_description("Embeddings")
        with self._timed("round"):
            for name in names:
                started = time.perf_counter()
                table, config = self.model.get_submodule(name).weight, self.config.for_module(name)
                result = quantize_embedding(table, config, name)
                self._record(name, table, result, time.perf_counter() - started)
                replace.replace_embedding(self.model, name, result, config)
        with self._timed("capture"):
            following = _split_batches(inputs.num_batches, self.config.calibrate_on)[1]
            again = capture_inputs(self.model, blocks, self.ids, self.config.batch_size)
            for batch in following:
                inputs.hidden[batch] = again.hidden[batch]

    def _quantize_block(self, block: nn.Module, index: int, prefix: str, names: list[str], inputs: BlockInputs) -> None:
        """Observe, quantize and replay one block; `prefix` is its name in the model with a dot."""
        dense, quantized = _split_batches(inputs.num_batches, self.config.calibrate_on)
        with self._timed("observe"), calibration_autocast(block):
            hessians = _Hessians(prefix)
            hessians.collect(block, index, names, inputs, dense)
        with self._timed("round"):
            results: dict[str, QuantizedWeight] = {}
            for leader, members in hessians.groups.items():
                hessian = hessians.pop(leader)
                for config, alike in self._by_config(prefix + n for n in members):
                    started = time.perf_counter()
                    weights = {name: replace.dense_weight(self.model.get_submodule(name)) for name in alike}
                    done = quantize_weights(weights, hessian, config)
                    seconds = (time.perf_counter() - started) / len(done)
                    for full_name, result in done.items():
                        self._record(full_name, weights[full_name], result, seconds)
                    results.update(done)
            for full_name in (prefix + n for n in names if prefix + n not in results):
                logger.warning("%s: no calibration token reached it, so it is quantized without calibration", full_name)
                weight = replace.dense_weight(self.model.get_submodule(full_name))
                results[full_name] = quantize_weight(weight, self.config.for_module(full_name), full_name)
                self._record(full_name, weight, results[full_name], 0.0)
        with self._timed("replay"), calibration_autocast(block):
            for n in names:
                # Its values as a dense weight make the replay one product a linear instead of a decode a batch.
                config = self.config.for_module(prefix + n)
                block.set_submodule(n, _Replayed(replace.replace_linear(block, n, results.pop(prefix + n), config)))
            if index + 1 < inputs.num_blocks:
                inputs.advance(index, block, quantized)
            for n in names:
                block.set_submodule(n, block.get_submodule(n).quantized)

    def _quantize_after_blocks(self, name: str) -> None:
        """Quantize a linear that reads what the quantized blocks make of the tokens: the output embeddings."""
        with self._timed("observe"):
            hessian = self._hessian_after_blocks(name, self.ids)
        with self._timed("round"):
            started = time.perf_counter()
            weight = replace.dense_weight(self.model.get_submodule(name))
            config = self.config.for_module(name)
            result = quantize_weights({name: weight}, hessian, config)[name]
            self._record(name, weight, result, time.perf_counter() - started)
            replace.replace_linear(self.model, name, result, config)

    def _hessian_after_blocks(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        linear = self.model.get_submodule(name)
        accumulator = HessianAccumulator(replace.linear_shape(linear)[1], linear.weight.device, name)
        with evaluating(self.model), calibration_autocast(self.model):
            observe_until(self.model, linear, ids.split(self.config.batch_size), accumulator.add)
        return accumulator.hessian()

    def _by_config(self, names: Iterable[str]) -> list[tuple[QuipConfig, list[str]]]:
        """The modules of one input, those with the same options together: they are rounded as one stack of rows."""
        groups: list[tuple[QuipConfig, list[str]]] = []
        for name in names:
            config = self.config.for_module(name)
            alike = next((members for other, members in groups if other == config), None)
            if alike is None:
                groups.append((config, [name]))
            else:
                alike.append(name)
        return groups

    def _record(self, name: str, weight: torch.Tensor, result: QuantizedWeight, seconds: float) -> None:
        self.report.modules.append({"name": name, "shape": list(weight.shape), "seconds": seconds, **result.statistics})
        error, mean = result.statistics["relative_error"], self.report.mean_relative_error
        advance(self.bar, name, error, mean)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.report.seconds[stage] += time.perf_counter() - started


def _split_batches(count: int, calibrate_on: str) -> tuple[range, range]:
    """The batches that follow the dense model, and those that follow the model quantized so far."""
    dense = {"dense": range(count), "quantized": range(0), "mixed": range(1, count, 2)}[calibrate_on]
    quantized = {"dense": range(0), "quantized": range(count), "mixed": range(0, count, 2)}[calibrate_on]
    return dense, quantized


class _Replayed(nn.Module):
    """A quantized linear while its block is replayed: the same values as a dense weight."""

    def __init__(self, quantized: nn.Module):
        super().__init__()
        self.quantized = quantized
        self.dense = quantized.dequantize()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.dense.to(x.dtype), self.quantized.bias)


class _Hessians:
    """The Hessian of every input that the linears of one block read.

    Args:
        prefix: the block's name in the model with a dot, for errors.

    Attributes:
        groups: leader → the linears that read one input.
    """

    def __init__(self, prefix: str):
        self.prefix = prefix
        self.groups: Mapping[str, tuple[str, ...]] = {}
        self._accumulators: dict[str, HessianAccumulator] = {}

    def collect(self, block: nn.Module, index: int, names: list[str], inputs: BlockInputs, dense: range) -> None:
        """Run the dense block over all batches, once; the batches of `dense` are advanced by that pass."""
        with observe_linears(block, names, self._add) as observer:
            for batch in range(inputs.num_batches):
                output = inputs.call(index, block, batch)
                if batch in dense:
                    inputs.hidden[batch] = output.to(inputs.storage_device)
        self.groups = observer.groups

    def pop(self, leader: str) -> torch.Tensor:
        """The Hessian of one input; its accumulator is freed."""
        accumulator = self._accumulators.pop(leader)
        if accumulator.tokens < accumulator.size:
            logger.warning(
                "%s: %d calibration tokens are too few for its %d inputs (its Hessian has no full rank): raise num_samples",
                ", ".join(self.prefix + name for name in self.groups[leader]),
                accumulator.tokens,
                accumulator.size,
            )
        return accumulator.hessian()

    def _add(self, leader: str, x: torch.Tensor) -> None:
        if leader not in self._accumulators:
            self._accumulators[leader] = HessianAccumulator(x.shape[-1], x.device, self.prefix + leader)
        # What the product really multiplies: under autocast that is x in the lower precision.
        self._accumulators[leader].add(x.to(autocast_dtype(x)))
