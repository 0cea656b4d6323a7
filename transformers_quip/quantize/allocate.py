"""Choose the bits of each module for an average that no codebook has.

The perplexity of a quantized model grows by about Σ a_l t_l² over its modules, where t_l² is the relative squared error of
module l's weight and a_l its sensitivity (the linearity theorem of HIGGS, arXiv 2411.17525, section 3). So a_l is
measured once, with noise. Errors of feedback rounding are not white: they avoid the inputs' dominant directions, in some
modules much more than in others. So `mixed_bits` multiplies a_l by the share of the loss that is left then
(`layer.loss_of_rounding`). The rest is a knapsack problem.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from .. import codebooks
from ..calibration import BlockCall, BlockInputs, CapturedInputs, capture_inputs, find_blocks, run_after_blocks
from ..nn import replace
from .residence import IN_MEMORY, Residence

# Relative squared error of the noise: large enough to be seen in a short text, of the size of a 2-bit codebook's error.
NOISE = 0.05
SEQUENCES, TOKENS = 4, 128
# The budget is counted in at most this many units; sizes are rounded up to them, so that it is never exceeded.
_UNITS = 1 << 14


@torch.no_grad()
def measure_sensitivities(
    model: nn.Module, names: Sequence[str], ids: torch.Tensor, seed: int = 0, residence: Residence = IN_MEMORY
) -> dict[str, float]:
    """The sensitivity of the model's predictions to errors in each module.

    Goes through the model once, block by block: the hidden states that each disturbance has led to are carried along, so
    that one block's weights are needed at a time. The states of `SEQUENCES` sequences are kept for each module.

    Args:
        model: dense; its weights are restored.
        names: of its dense linears, stacks of experts and embeddings.
        ids: token ids [N, T]; the first `SEQUENCES` sequences are read, up to `TOKENS` tokens of each.
        seed: of the noise.
        residence: where the weights are.

    Returns:
        name → KL divergence of the model's predictions (nats a token) for each unit of the weight's relative squared
        error; never negative.

    Raises:
        ValueError: the model's logits are NaN or Inf.
    """
    ids = ids[:SEQUENCES, :TOKENS]
    blocks_name, blocks = find_blocks(model)
    noise = _noise(model, names, seed)
    outside = {name for name in names if not name.startswith(f"{blocks_name}.")}

    def disturbed(name: str) -> AbstractContextManager:
        return _disturbed(model, name, noise[name])

    def entering() -> CapturedInputs:
        return capture_inputs(model, blocks, ids, len(ids), progress=False)

    captured = entering()
    dense, changed = captured.hidden[0], {}
    for name in outside:
        with disturbed(name):
            changed[name] = entering().hidden[0]
    for index, block in enumerate(tqdm(blocks, desc="Measuring sensitivities", unit="block")):
        prefix = f"{blocks_name}.{index}."
        with residence.part(prefix):
            leaving = partial(_leaving, block, captured.calls[index])
            changed = {name: leaving(hidden) for name, hidden in changed.items()}
            for name in (name for name in names if name.startswith(prefix)):
                with disturbed(name):
                    changed[name] = leaving(dense)
            dense = leaving(dense)

    def predictions(hidden: torch.Tensor) -> torch.Tensor:
        return run_after_blocks(model, blocks, ids, hidden, captured.as_tuple).logits.float().log_softmax(-1)

    expected = predictions(dense)
    if not expected.isfinite().all():
        raise ValueError("the model's logits are NaN or Inf: it overflows in its dtype, or its weights do")
    result = {}
    for name in names:
        with disturbed(name) if name in outside else nullcontext():
            found = predictions(changed.pop(name))
        divergence = (expected.exp() * (expected - found)).sum(-1).mean().item()
        result[name] = max(divergence, 0.0) / NOISE
    return result


def _leaving(block: nn.Module, calls: Sequence[BlockCall], hidden: torch.Tensor) -> torch.Tensor:
    """The states of one batch after a block, on the CPU."""
    return BlockInputs([hidden], calls).call(block, 0).cpu()


def _noise(model: nn.Module, names: Sequence[str], seed: int) -> dict[str, torch.Tensor]:
    """The state of the generator from which each module's noise is drawn, in their order."""
    generator, states = torch.Generator().manual_seed(seed), {}
    for name in names:
        states[name] = generator.get_state()
        torch.randn(replace.weight_of(model, name).shape, generator=generator)
    return states


@contextmanager
def _disturbed(model: nn.Module, name: str, state: torch.Tensor):
    """Give a dense weight Gaussian noise within a `with` block; its own numbers may be a file's, and are kept."""
    weight, is_module = replace.weight_of(model, name).detach(), name in dict(model.named_modules())
    parameter = model.get_parameter(f"{name}.weight" if is_module else name)
    original, kept = parameter.data, weight.float()
    generator = torch.Generator()
    generator.set_state(state)
    noise = torch.randn(kept.shape, generator=generator).to(kept.device)
    noise *= (NOISE * kept.square().sum() / noise.square().sum().clamp_min(1e-30)).sqrt()
    changed = (kept + noise).to(original.dtype)
    try:
        # a Conv1D holds the transposed weight
        parameter.data = changed if weight.stride() == original.stride() else changed.T.contiguous()
        yield
    finally:
        parameter.data = original


def gaussian_error(codebook: str) -> float:
    """The mean squared error of a codebook on the unit Gaussian, measured on 32768 weights."""
    book = codebooks.get(codebook)
    size = book.rows_together * book.block_size
    blocks = torch.randn(32768 // size, size, generator=torch.Generator().manual_seed(0))
    points = book.encode(blocks * book.gaussian_scale)[1] / book.gaussian_scale
    return (points - blocks).square().mean().item()


def allocate(
    sizes: Mapping[str, int],
    sensitivities: Mapping[str, float],
    errors: Mapping[int, float],
    bits: float,
) -> dict[str, int]:
    """The bits of each module that make the sum of sensitivity · error least within a budget.

    Args:
        sizes: name → weights in the module.
        sensitivities: name → loss for each unit of relative squared error, not negative.
        errors: bits → relative squared error of the codebook with that many bits, for every choice.
        bits: the largest allowed average of bits per weight.

    Returns:
        name → bits. The best choice for sizes in units of their greatest common divisor, or (rounded up) of 1/16384 of
        the budget if that is larger.

    Raises:
        ValueError: the budget is below the smallest number of bits.
    """
    choices = sorted(errors)
    if bits < choices[0]:
        raise ValueError(f"bits={bits} is below the fewest that a codebook has, {choices[0]}")
    # Every module gets the minimum; the budget is the rest above it.
    budget = (bits - choices[0]) * sum(sizes.values())
    unit = max(int(np.gcd.reduce(list(sizes.values()))), int(budget // _UNITS), 1)
    room = int(budget / unit + 1e-9)
    # least[u]: the least loss of the modules so far with u units above the minimum; taken[l][u]: the choice made for it.
    least = np.zeros(room + 1)
    taken = np.zeros((len(sizes), room + 1), dtype=np.int8)
    for index, (name, size) in enumerate(sizes.items()):
        candidates = np.full((len(choices), room + 1), np.inf)
        for choice, number in enumerate(choices):
            cost = -(-size * (number - choices[0]) // unit)
            if cost <= room:
                candidates[choice, cost:] = least[: room + 1 - cost] + sensitivities[name] * errors[number]
        taken[index] = candidates.argmin(0)
        least = candidates.min(0)
    result, left = {}, room
    for index, (name, size) in reversed(list(enumerate(sizes.items()))):
        number = choices[taken[index, left]]
        result[name] = number
        left -= -(-size * (number - choices[0]) // unit)
    return {name: result[name] for name in sizes}
