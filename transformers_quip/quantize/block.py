"""One decoder block: observe its linears, then round and replace them, group by group.

Nothing here depends on the model around the block, on the source of its weights or the destination of its results. The
input is a block and its inputs; the output is plain data.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from dataclasses import replace as replace_fields
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from ..calibration import BlockHessians, BlockInputs, processes
from ..calibration.curvature import Curvature
from ..calibration.experts import ExpertHessians
from ..calibration.precision import calibration_autocast, cpu_matmul_precision
from ..memory import free_memory
from ..nn import QuipLinear, replace
from ..nn.experts import QuipExperts
from .experts import experts_in, place_experts, round_experts
from .layer import QuantizedWeight, quantize_weight, quantize_weights
from .stack import QuantizedStack

if TYPE_CHECKING:
    from ..config import QuipConfig

logger = logging.getLogger(__name__)

# Bytes for each entry of a Hessian while its group is rounded, and for each entry of the group's weights.
_HESSIAN_BYTES, _WEIGHT_BYTES = 40, 32


@dataclass
class ModuleResult:
    """One module, or one projection of all experts of a mixture, that was quantized.

    Attributes:
        name: its full name in the model.
        shape: (rows, columns) of its weight; (experts, rows, columns) of a projection.
        quantized: the replacement of the weight.
        seconds: wall time of its rounding; of linears that were rounded together, an equal share.
    """

    name: str
    shape: tuple[int, ...]
    quantized: QuantizedWeight | QuantizedStack
    seconds: float = 0.0

    @property
    def record(self) -> dict[str, Any]:
        """Its record in a report: "name", "shape", "seconds", and the statistics of [`QuantizedWeight`]."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "seconds": self.seconds,
            **self.quantized.statistics,
        }


@dataclass
class BlockResult:
    """The result of quantizing a block: plain data, which can be stored or sent to another process.

    Attributes:
        modules: the name inside the block → its result, in the order in which they were rounded.
        vectors: the block's norms and biases after tuning, by name; empty without tuning.
        seconds: wall time of each stage: "observe", "round", "tune".
        borrowing: of projections of experts that saw few tokens, see [`ExpertHessians.borrowing`].
    """

    modules: dict[str, ModuleResult] = field(default_factory=dict)
    vectors: dict[str, torch.Tensor] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    borrowing: dict[str, tuple[int, int, int]] = field(default_factory=dict)


class Tuner(Protocol):
    """Tunes a block between the roundings of its groups; `finetune.blockwise.BlockTuner`."""

    def observe(self, batch: int, output: torch.Tensor) -> None:
        """Take the dense block's output [B, T, H] for one batch."""

    def tune(self, block: nn.Module, names: Sequence[str], remaining: Sequence[str]) -> None:
        """Change the block after the linears `names` were replaced; the linears `remaining` are dense until later."""


@cpu_matmul_precision("ieee")
@torch.inference_mode(False)
@torch.no_grad()
def quantize_block(
    block: nn.Module,
    inputs: BlockInputs,
    configs: Mapping[str, QuipConfig],
    prefix: str = "",
    on_output: Callable[[int, torch.Tensor], None] | None = None,
    on_module: Callable[[ModuleResult], None] | None = None,
    tuner: Tuner | None = None,
    curvature: Mapping[str, Curvature] | None = None,
    shared: bool = False,
) -> BlockResult:
    """Quantize the linears and experts of one block: observe all of them, then round and replace them.

    The experts of mixtures come first, then each group of linears that reads one input.

    The result depends on the arguments alone, and the only thing that changes is `block`, whose linears are replaced.

    Args:
        block: dense, in memory, on any device.
        inputs: the inputs of the block.
        configs: the name of a linear, or of a projection of experts, inside the block → its options, without an average of
            bits (`is_mixed`).
        prefix: the block's name in the model with a dot, for names in results and messages.
        on_output: gets the number and the dense block's output [B, T, H] of each batch, once, before anything is replaced.
        on_module: gets each result as soon as it is ready, for a progress bar; later tuning may change its su and sv.
        curvature: the name of a linear inside the block → its two Hessians, for those with a two-sided rounding method.
        tuner: tunes the block after each of its groups but the last, which leaves nothing dense to tune.
        shared: whether all processes are here with the same block and with inputs of their own: Hessians are added up, and
            each process rounds some of the groups. The result is the same in all of them, and the one that a single process
            has with all inputs. Not with a `tuner`.

    Raises:
        ValueError: see [`quantize_weights`], [`BlockHessians.pop`] and `observe_linears`.
    """
    result = BlockResult()
    experts = experts_in(block, configs)
    stacks = [name for names in experts.values() for name in names]
    linears = [name for name in configs if name not in stacks]
    of_experts = ExpertHessians(block, list(experts), prefix)
    # further passes read the inputs once more, when some have been replaced by outputs
    unchanged = replace_fields(inputs, hidden=list(inputs.hidden)) if len(of_experts.passes) > 1 else inputs
    with timed(result.seconds, "observe"), of_experts.watching(block, 0):
        hessians = observe_block(block, linears, inputs, prefix, _both(tuner, on_output), of_experts.forget)
        owners = hessians.share(block) if shared else {}
    with timed(result.seconds, "round"):
        rounded = round_experts(block, of_experts, unchanged, configs, shared)
        shapes = {name: of_experts.shape(name) for name in rounded}
        place_experts(block, {name: quantized for name, (quantized, _) in rounded.items()}, configs)
        done = {name: ModuleResult(prefix + name, shapes[name], *rounded[name]) for name in stacks}
        _collect(done, result, on_module)
        result.borrowing = of_experts.borrowing()
    waiting = [name for group in hessians.groups.values() for name in group]
    reached = frozenset(waiting)
    if shared:
        with timed(result.seconds, "round"):
            for done in _round_together(block, hessians, owners, configs, prefix, curvature or {}):
                _replace(block, done, configs)
                _collect(done, result, on_module)
    for leader, group in () if shared else hessians.groups.items():
        with timed(result.seconds, "round"):
            done = quantize_group(block, group, hessians.pop(leader), configs, prefix, curvature or {})
            _replace(block, done, configs)
            _collect(done, result, on_module)
        waiting = [name for name in waiting if name not in group]
        if tuner is not None and waiting:
            with timed(result.seconds, "tune"):
                tuner.tune(block, group, waiting)
    with timed(result.seconds, "round"):
        for name in (name for name in linears if name not in reached):
            logger.warning("%s: no calibration token reached it, so it is quantized without calibration", prefix + name)
            weight = replace.dense_weight(block.get_submodule(name))
            quantized = quantize_weight(weight, configs[name], prefix + name)
            done = {name: ModuleResult(prefix + name, (weight.shape[0], weight.shape[1]), quantized)}
            _replace(block, done, configs)
            _collect(done, result, on_module)
    if tuner is not None:
        _take_tuned(block, result)
    return result


def _round_together(
    block: nn.Module,
    hessians: BlockHessians,
    owners: Mapping[str, int],
    configs: Mapping[str, QuipConfig],
    prefix: str,
    curvature: Mapping[str, Curvature],
) -> list[dict[str, ModuleResult]]:
    """The results of all groups, in their order, of which each process rounds its own."""
    own = {}
    for leader, group in hessians.groups.items():
        if owners[leader] == processes.rank():
            done = quantize_group(block, group, hessians.pop(leader), configs, prefix, curvature)
            own[leader] = {name: _on_cpu(module) for name, module in done.items()}
    everyone = processes.gathered(own)
    return [everyone[owners[leader]][leader] for leader in hessians.groups]


def _on_cpu(module: ModuleResult) -> ModuleResult:
    """The same result on the CPU, to be sent."""
    quantized = module.quantized
    return replace_fields(module, quantized=quantized.cpu() if isinstance(quantized, QuantizedWeight) else quantized)


@cpu_matmul_precision("ieee")
@torch.no_grad()
def observe_block(
    block: nn.Module,
    names: Sequence[str],
    inputs: BlockInputs,
    prefix: str = "",
    on_output: Callable[[int, torch.Tensor], None] | None = None,
    on_restart: Callable[[], None] | None = None,
) -> BlockHessians:
    """Run the dense block over all batches, once: the first half of [`quantize_block`], whose arguments it takes."""
    with calibration_autocast(block):
        return BlockHessians(prefix).collect(block, names, inputs, on_output, on_restart)


def quantize_group(
    module: nn.Module,
    names: Iterable[str],
    hessian: torch.Tensor,
    configs: Mapping[str, QuipConfig],
    prefix: str = "",
    curvature: Mapping[str, Curvature] | None = None,
) -> dict[str, ModuleResult]:
    """Round the linears that read one input; those with the same options as one stack of rows. Nothing is replaced.

    Groups of a block that is not tuned in between may be rounded in any order, or in several processes.

    Args:
        module: the module that holds the dense linears.
        names: of the linears in it.
        hessian: float32 [n, n] of their input.
        configs, prefix, curvature: see [`quantize_block`].

    Raises:
        ValueError: see [`quantize_weights`].
    """
    result = {}
    for config, alike in by_config(names, configs):
        started = time.perf_counter()
        weights = {prefix + name: replace.dense_weight(module.get_submodule(name)) for name in alike}
        known = {name: curvature[name] for name in alike if name in curvature} if curvature else {}
        sums = [found.hessian_in for found in known.values() if found.hessian_in is not None]
        inner = torch.stack(sums).sum(0) if sums else hessian
        outputs = {prefix + name: found.hessian_out for name, found in known.items()}
        shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        device = _rounding_device(weights, inner)
        weights, inner = {name: weight.to(device) for name, weight in weights.items()}, inner.to(device)
        quantized = quantize_weights(weights, inner, config, outputs)
        seconds = (time.perf_counter() - started) / len(weights)
        for name in alike:
            full_name = prefix + name
            rows, columns = shapes[full_name]
            result[name] = ModuleResult(full_name, (rows, columns), quantized[full_name], seconds)
    return result


def _rounding_device(weights: Mapping[str, torch.Tensor], hessian: torch.Tensor) -> torch.device:
    """The weights' device, or the CPU if the rounding of these weights needs more memory than that device has free."""
    device, columns = next(iter(weights.values())).device, len(hessian)
    rows = sum(len(weight) for weight in weights.values())
    if device.type == "cpu" or rounding_bytes(rows, columns) <= free_memory(device):
        return device
    logger.info("%s: too large to be rounded on %s, so that is done on the CPU", ", ".join(weights), device)
    return torch.device("cpu")


def rounding_bytes(rows: int, columns: int) -> int:
    """Bytes of memory, besides the dense weights, for rounding this number of rows that read one input."""
    return _HESSIAN_BYTES * columns**2 + _WEIGHT_BYTES * rows * columns


def by_config(names: Iterable[str], configs: Mapping[str, QuipConfig]) -> list[tuple[QuipConfig, list[str]]]:
    """The modules with the same options together."""
    groups: list[tuple[QuipConfig, list[str]]] = []
    for name in names:
        config = configs[name]
        alike = next((members for other, members in groups if other == config), None)
        if alike is None:
            groups.append((config, [name]))
        else:
            alike.append(name)
    return groups


@contextmanager
def replayed_densely(block: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """A context in which these quantized linears of the block, and its experts, hold their values as dense weights.

    Then running the block over many batches costs one product for each linear and batch, instead of decoding each time.
    """
    wanted, modules = set(names), dict(block.named_modules())
    dense: dict[str, nn.Module] = {}
    for name, module in modules.items():
        if isinstance(module, QuipExperts) or (isinstance(module, QuipLinear) and name in wanted):
            dense[name] = replace.to_dense(module)
    try:
        for name, module in dense.items():
            block.set_submodule(name, module)
        yield
    finally:
        for name in dense:
            block.set_submodule(name, modules[name])


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the wall time of the body to `seconds[stage]`."""
    started = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - started


def _replace(block: nn.Module, done: Mapping[str, ModuleResult], configs: Mapping[str, QuipConfig]) -> None:
    for name, module in done.items():
        replace.replace_linear(block, name, module.quantized, configs[name])


def _both(
    tuner: Tuner | None, on_output: Callable[[int, torch.Tensor], None] | None
) -> Callable[[int, torch.Tensor], None] | None:
    """A function that gives each batch's output to both."""
    if tuner is None:
        return on_output

    def take(batch: int, output: torch.Tensor) -> None:
        tuner.observe(batch, output)
        if on_output is not None:
            on_output(batch, output)

    return take


def _take_tuned(block: nn.Module, result: BlockResult) -> None:
    """Bring the results up to date with the block, whose vectors were tuned after they were collected."""
    for name, module in result.modules.items():
        if isinstance(module.quantized, QuantizedStack):
            continue  # its vectors are not tuned
        linear = block.get_submodule(name)
        assert isinstance(linear, QuipLinear)
        su, sv = (vector.detach().float() for vector in (linear.su, linear.sv))
        columns, rows = len(module.quantized.su), len(module.quantized.sv)
        module.quantized = replace_fields(module.quantized, su=su[:columns], sv=sv[:rows])
    own = {f"{name}.{vector}" for name in result.modules for vector in ("su", "sv")}
    for name, parameter in block.named_parameters():
        if parameter.ndim == 1 and parameter.is_floating_point() and name not in own:
            result.vectors[name] = parameter.detach()


def _collect(
    done: Mapping[str, ModuleResult], result: BlockResult, on_module: Callable[[ModuleResult], None] | None
) -> None:
    result.modules.update(done)
    if on_module is not None:
        for module in done.values():
            on_module(module)
