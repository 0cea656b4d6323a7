"""The experts of one block: observe them in as many passes as their Hessians need, round them, replace them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..calibration import BlockInputs, processes
from ..calibration.experts import ExpertHessians, key
from ..calibration.precision import calibration_autocast
from ..nn.replace import dense_stacks, replace_experts
from .layer import QuantizedWeight, quantize_weight
from .stack import QuantizedStack, quantize_expert

if TYPE_CHECKING:
    from ..config import QuipConfig


def experts_in(block: nn.Module, names: Iterable[str]) -> dict[str, list[str]]:
    """The modules of dense experts of a block → those of these names that are their projections."""
    found: dict[str, list[str]] = {}
    stacks = dense_stacks(block)
    for name in names:
        if name in stacks:
            found.setdefault(name.rpartition(".")[0], []).append(name)
    return found


def round_experts(
    block: nn.Module,
    hessians: ExpertHessians,
    inputs: BlockInputs,
    configs: Mapping[str, QuipConfig],
    shared: bool = False,
) -> dict[str, tuple[QuantizedStack, float]]:
    """Round every expert of a block whose first pass is done; nothing is replaced.

    Args:
        block: with dense experts.
        hessians: after its first pass.
        inputs: of the block as they were in the first pass, for the further ones.
        configs: name of a projection in the block → its options.
        shared: whether all processes are here; each rounds some of the experts.

    Returns:
        name → the projection's weights, and the seconds of their rounding in this process.
    """
    done: dict[str, list[QuantizedWeight]] = {}
    seconds: dict[str, float] = {}
    for number, parts in enumerate(hessians.passes):
        if number:
            with hessians.watching(block, number), calibration_autocast(block), torch.no_grad():
                for batch in range(inputs.num_batches):
                    inputs.call(block, batch)
        owners, own = hessians.share() if shared else {}, {}
        for part in parts:
            started = time.perf_counter()
            weights = part.stack.split(block.get_parameter(part.name))
            for expert in part.experts:
                name = key(part.name, expert)
                if owners.get(name, processes.rank()) == processes.rank():
                    hessian = hessians.pop(part.name, expert)
                    own[name] = _round(weights[expert], hessian, configs[part.name], hessians.prefix + name)
            seconds[part.name] = seconds.get(part.name, 0.0) + time.perf_counter() - started
        if shared:
            own = {name: found for theirs in processes.gathered(_on_cpu(own)) for name, found in theirs.items()}
        for part in parts:
            done.setdefault(part.name, []).extend(own[key(part.name, expert)] for expert in part.experts)
    return {name: (QuantizedStack.of(found), seconds[name]) for name, found in done.items()}


def _on_cpu(done: Mapping[str, QuantizedWeight]) -> dict[str, QuantizedWeight]:
    return {name: quantized.cpu() for name, quantized in done.items()}


def _round(weight: torch.Tensor, hessian: torch.Tensor | None, config: QuipConfig, name: str) -> QuantizedWeight:
    if hessian is None:  # the block's router sent no token to any of its experts
        return quantize_weight(weight, config, name)
    return quantize_expert(weight, hessian, config, name)


def place_experts(block: nn.Module, rounded: Mapping[str, QuantizedStack], configs: Mapping[str, QuipConfig]) -> None:
    """Put quantized experts in the place of the dense ones.

    Args:
        block: with dense experts.
        rounded: name of a projection in the block → its weights; of a module of experts, all or none.
        configs: name of a projection in the block → its options.
    """
    modules: dict[str, Any] = {}
    for name, quantized in rounded.items():
        module, _, stack = name.rpartition(".")
        if module not in modules:
            device = block.get_parameter(name).device
            modules[module] = replace_experts(block, module, _InBlock(configs)), device
        placed, device = modules[module]
        placed.take(stack, quantized, device)


class _InBlock:
    """The configs of a block as a module asks for them."""

    def __init__(self, configs: Mapping[str, QuipConfig]):
        self._configs = configs

    def for_module(self, name: str) -> QuipConfig:
        """See [`QuipConfig.for_module`]."""
        return self._configs[name]


def few_tokens(borrowing: Mapping[str, tuple[int, int, int]]) -> str:
    """One sentence on experts with few tokens, from [`ExpertHessians.borrowing`]; "" if there are none."""
    if not borrowing:
        return ""
    few, all_, fewest = zip(*borrowing.values(), strict=True)
    return (
        f"{sum(few)} of {sum(all_)} matrices of experts saw fewer calibration tokens than they have inputs (the fewest: "
        f"{min(fewest)}), so they borrow from their siblings' Hessians: raise num_samples for Hessians of their own"
    )
