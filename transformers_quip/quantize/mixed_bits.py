"""Turn an average number of bits into bits for each module, measured on the dense model; `allocate` has the method."""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
from torch import nn
from tqdm.auto import tqdm

from .. import codebooks
from ..calibration import HessianAccumulator, capture_inputs, find_blocks
from ..calibration.device import evaluating
from ..calibration.inputs import GivenInputs, split
from ..calibration.observe import observe_until
from ..calibration.precision import calibration_autocast
from ..config.bits import mixed_bits
from ..nn import replace
from .allocate import allocate, gaussian_error, measure_sensitivities
from .block import by_config, observe_block
from .layer import loss_of_rounding
from .plan import QuantizationPlan
from .residence import IN_MEMORY, Residence

if TYPE_CHECKING:
    from ..config import QuipConfig

logger = logging.getLogger(__name__)

# Number of tokens for Hessians that only serve to choose bits.
_RATIO_TOKENS = 1 << 15


def settle_bits(
    model: nn.Module, config: QuipConfig, plan: QuantizationPlan, ids: torch.Tensor, residence: Residence = IN_MEMORY
) -> QuipConfig:
    """Choose the bits of each module without bits of its own, for `config.bits` as an average.

    Args:
        model: dense; it is not changed.
        config: with an average (`is_mixed`); it is not changed.
        plan: the modules to quantize.
        ids: token ids [N, T] to measure on.
        residence: where the weights are.

    Returns:
        A copy of `config` whose `modules` names the bits of each module, before the patterns of the caller, which still
        hold: later ones win.
    """
    entries = {e.name: e for e in plan.entries if e.quantized and config.for_module(e.name).is_mixed}
    sensitivities = measure_sensitivities(model, list(entries), ids, config.seed, residence)
    linears = [name for name in entries if name not in plan.stacks]
    ratios = _losses_of_rounding(model, config, linears, plan, ids, residence)
    usual = sum(ratios.values()) / len(ratios) if ratios else 1.0
    for name in entries:  # experts, which are many, are taken to be like the linears
        sensitivities[name] *= ratios.get(name, usual if name in plan.stacks else 1.0)
    choices = mixed_bits(config.bits, config.codebook)
    errors = {bits: gaussian_error(codebooks.default_for_bits(bits, config.codebook)) for bits in choices}
    bits = allocate({n: e.parameters for n, e in entries.items()}, sensitivities, errors, config.bits)
    counts = ", ".join(f"{list(bits.values()).count(number)} with {number}" for number in choices)
    logger.info("bits=%s on the average: of %d modules %s bits.", config.bits, len(bits), counts)
    modules: dict[str, dict] = {name: {"bits": number} for name, number in bits.items()}
    return config.with_modules(modules)


def hessian_after_blocks(model: nn.Module, name: str, data: torch.Tensor | GivenInputs, batch_size: int) -> torch.Tensor:
    """The Hessian float32 [n, n] of a linear that reads the output of all blocks: the output embeddings."""
    linear = model.get_submodule(name)
    weight = replace.dense_weight(linear)
    accumulator = HessianAccumulator(weight.shape[1], weight.device, name)
    with evaluating(model), calibration_autocast(model):
        observe_until(model, linear, split(data, batch_size), accumulator.add)
    return accumulator.hessian()


def _losses_of_rounding(
    model: nn.Module,
    config: QuipConfig,
    names: Collection[str],
    plan: QuantizationPlan,
    ids: torch.Tensor,
    residence: Residence,
) -> dict[str, float]:
    """The loss of rounding errors as a share of the loss of independent errors, for these modules."""
    ids = ids[: max(_RATIO_TOKENS // ids.shape[1], 1)]
    blocks_name, blocks = find_blocks(model)
    inputs = capture_inputs(model, blocks, ids, config.batch_size)
    result: dict[str, float] = {}

    def add(chosen: Collection[str], hessian: torch.Tensor) -> None:
        for own, alike in by_config(chosen, {name: config.for_module(name) for name in chosen}):
            trial = copy.copy(own)
            trial.update(bits=mixed_bits(own.bits, own.codebook)[0])  # the ratio hardly depends on the bits
            weights = {name: replace.dense_weight(model.get_submodule(name)) for name in alike}
            result.update(loss_of_rounding(weights, hessian, trial))

    for index, block in enumerate(tqdm(blocks, desc="Predicting losses", unit="block")):
        prefix = f"{blocks_name}.{index}."
        linears = [name for name in plan.inside(prefix) if prefix + name not in plan.stacks]
        with residence.part(prefix):
            hessians = observe_block(block, linears, inputs.of_block(index), prefix, inputs.store)
            for leader, group in hessians.groups.items():
                add([prefix + member for member in group if prefix + member in names], hessians.pop(leader))
    for outside in (name for name in names if not name.startswith(f"{blocks_name}.")):
        if outside not in plan.embeddings:  # their rows have no feedback
            with residence.whole():
                hessian = hessian_after_blocks(model, outside, ids, config.batch_size)
            add([outside], hessian)
    return result
