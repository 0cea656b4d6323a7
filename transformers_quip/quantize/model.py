"""The calibrated recipe: block by block through a model, with the memory of one block beside it."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..calibration import (
    BlockInputs,
    CrossMomentAccumulator,
    HessianAccumulator,
    capture_inputs,
    find_blocks,
    observe_linears,
)
from ..calibration.dataset import load_token_ids
from ..calibration.device import cpu_matmul_precision
from ..nn import replace
from .layer import QuantizedWeight, quantize_weight, quantize_weights
from .plan import make_plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..config import QuipConfig

logger = logging.getLogger(__name__)

# The forward passes of a float32 model on a CPU: three times as fast on one with bfloat16 products, and the Hessians
# differ by less than their sampling noise. Hessians, transforms and rounding are always computed in float32.
_FORWARD_PRECISION = "bf16"


@dataclass
class QuantizationReport:
    """What a calibrated run did.

    Attributes:
        data: which text was used, as a sentence.
        tokens: how many.
        modules: a record for each quantized module: "name", "shape", "seconds", and the statistics of
            [`QuantizedWeight`].
        seconds: wall time of each stage: "data", "capture", "observe", "round", "replay".
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
def quantize_model(model: PreTrainedModel, config: QuipConfig, tokenizer: Any = None) -> QuantizationReport:
    """Quantize the linears of a causal model's decoder blocks, in place.

    For each block in turn: Hessians from one pass over the calibration tokens, all its weights quantized, and the
    block replayed with them. Beside the model, memory holds one block's Hessians and one set of hidden states (two
    with `calibrate_on="both"`), on the CPU.

    Args:
        model: dense, in memory.
        config: how; `config.calibration` is set to a record of the data that was used.
        tokenizer: for a data set of text, before `config.tokenizer` and the model's own.

    Returns:
        What was done to each module.

    Raises:
        ValueError: see [`make_plan`], [`load_token_ids`] and [`quantize_weights`].
    """
    with cpu_matmul_precision("ieee"):  # a Hessian rotated in lower precision is no longer positive definite
        return _quantize_model(model, config, tokenizer)


def _quantize_model(model: PreTrainedModel, config: QuipConfig, tokenizer: Any) -> QuantizationReport:
    started = time.perf_counter()
    plan = make_plan(model, config)
    ids, description = load_token_ids(config, model, tokenizer)
    logger.info("Calibrating on %s.", description)
    report = QuantizationReport(description, ids.numel())
    report.seconds["data"] = time.perf_counter() - started
    name, blocks = find_blocks(model)
    with _timed(report, "capture"):
        inputs = capture_inputs(model, blocks, ids, config.batch_size)
    dense = inputs.fork() if config.calibrate_on == "both" else None
    bar = tqdm(blocks, desc="Quantizing", unit="block")
    for index, block in enumerate(bar):
        prefix = f"{name}.{index}."
        names = [entry.removeprefix(prefix) for entry in plan.names if entry.startswith(prefix)]
        _quantize_block(block, index, prefix, names, inputs, dense, config, report)
        if report.modules:
            bar.set_postfix_str(f"relative error {report.mean_relative_error:.4f}")
    config.calibration = {
        "data": description,
        "sequences": ids.shape[0],
        "tokens": ids.numel(),
        "mean_relative_error": round(report.mean_relative_error, 6),
    }
    return report


def _quantize_block(
    block: nn.Module,
    index: int,
    prefix: str,
    names: list[str],
    inputs: BlockInputs,
    dense: BlockInputs | None,
    config: QuipConfig,
    report: QuantizationReport,
) -> None:
    """Observe, quantize and replay one block; `prefix` is its name in the model with a dot."""
    with _timed(report, "observe"):
        statistics = _BlockStatistics(prefix, config.calibrate_on)
        with cpu_matmul_precision(_FORWARD_PRECISION):
            statistics.collect(block, index, names, inputs, dense)
    quantized: dict[str, QuantizedWeight] = {}
    with _timed(report, "round"):
        for leader, members in statistics.groups.items():
            started = time.perf_counter()
            weights = {prefix + n: replace.dense_weight(block.get_submodule(n)) for n in members}
            hessian, drift = statistics.pop(leader)
            done = quantize_weights(weights, hessian, config, drift)
            for full_name, result in done.items():
                quantized[full_name] = result
                report.modules.append(
                    {
                        "name": full_name,
                        "shape": list(weights[full_name].shape),
                        "seconds": (time.perf_counter() - started) / len(done),
                        **result.statistics,
                    }
                )
    for n in names:
        if prefix + n not in quantized:
            logger.warning(
                "%s: no calibration token reached it (of %d), so it is quantized without calibration",
                prefix + n,
                report.tokens,
            )
            weight = replace.dense_weight(block.get_submodule(n))
            result = quantize_weight(weight, config, prefix + n)
            quantized[prefix + n] = result
            report.modules.append({"name": prefix + n, "shape": list(weight.shape), "seconds": 0.0, **result.statistics})
    with _timed(report, "replay"):
        for n in names:
            module = replace.replace_linear(block, n, quantized.pop(prefix + n), config)
            # Dense weights with the same values make the replay one plain product a linear instead of a decode a batch.
            block.set_submodule(n, _Replayed(module))
        if config.calibrate_on != "dense" and index + 1 < inputs.num_blocks:
            with cpu_matmul_precision(_FORWARD_PRECISION):
                inputs.advance(index, block)
        for n in names:
            block.set_submodule(n, block.get_submodule(n).quantized)


class _Replayed(nn.Module):
    """A quantized linear while its block is replayed: the same values as a dense weight."""

    def __init__(self, quantized: nn.Module):
        super().__init__()
        self.quantized = quantized
        self.dense = quantized.dequantize()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.dense.to(x.dtype), self.quantized.bias)


class _BlockStatistics:
    """Hessians, and where asked for drifts, of every input that the linears of one block read.

    Args:
        prefix: the block's name in the model with a dot, for errors.
        calibrate_on: the option of the config.

    Attributes:
        groups: leader → the linears that read one input.
    """

    def __init__(self, prefix: str, calibrate_on: str):
        self.prefix = prefix
        self.calibrate_on = calibrate_on
        self.groups: Mapping[str, tuple[str, ...]] = {}
        self._hessians: dict[str, HessianAccumulator] = {}
        self._drifts: dict[str, CrossMomentAccumulator] = {}
        # The dense model's inputs in the present batch, in the order of the calls; the quantized model's follow.
        self._reference: dict[str, list[torch.Tensor]] = defaultdict(list)
        self._in_dense_model = False

    def collect(
        self, block: nn.Module, index: int, names: list[str], inputs: BlockInputs, dense: BlockInputs | None
    ) -> None:
        """Run the block over all batches. The hidden states of the dense model are advanced on the way."""
        with observe_linears(block, names, self._observe) as observer:
            for batch in range(inputs.num_batches):
                if dense is not None:
                    self._reference.clear()
                    self._in_dense_model = True
                    dense.hidden[batch] = dense.call(index, block, batch).to(dense.storage_device)
                    self._in_dense_model = False
                output = inputs.call(index, block, batch)
                if self.calibrate_on == "dense":
                    inputs.hidden[batch] = output.to(inputs.storage_device)
        self.groups = observer.groups

    def pop(self, leader: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The Hessian and the drift of one input; their accumulators are freed."""
        hessian = self._hessians.pop(leader).hessian()
        drift = self._drifts.pop(leader, None)
        return hessian, None if drift is None else drift.moment()

    def _observe(self, leader: str, x: torch.Tensor) -> None:
        if self._in_dense_model:
            self._reference[leader].append(x)
            return
        size, name = x.shape[-1], self.prefix + leader
        first = leader not in self._hessians
        if first:
            self._hessians[leader] = HessianAccumulator(size, x.device, name)
        self._hessians[leader].add(x)
        if self.calibrate_on != "both":
            return
        reference = self._reference[leader].pop(0) if self._reference[leader] else None
        if reference is None or reference.shape != x.shape:
            # An expert that another set of tokens was routed to: there is nothing to compare token by token.
            self._drifts.pop(leader, None)
        elif first or leader in self._drifts:
            drift = self._drifts.setdefault(leader, CrossMomentAccumulator(size, x.device, name))
            drift.add(reference - x, x)


@contextmanager
def _timed(report: QuantizationReport, stage: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    report.seconds[stage] += time.perf_counter() - started
