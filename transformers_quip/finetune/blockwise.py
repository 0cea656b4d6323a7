"""Blockwise tuning in QuIP#'s order (arXiv 2402.04396, section 5): between the roundings of a block's groups of linears.

After the linears that read one input are rounded and replaced, the block's remaining dense weights, its norms, and the su
and sv that it has already are trained, so that the block's output follows the output of the dense block. The dense weights
make up for the error that is there, and are rounded afterwards. Only one block's weights are trained at a time.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..calibration.device import evaluating, execution_device, move
from ..nn.replace import is_dense_linear
from .student import tuned_module

if TYPE_CHECKING:
    from ..calibration import BlockInputs
    from ..config.tune import TuneOptions

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GroupRecord:
    """The tuning after one group of linears.

    Attributes:
        names: of the linears that were rounded last.
        before, after: the loss on the windows of the block that were not trained on, see [`BlockTuner`].
        kept: whether it became smaller; otherwise the block is as it was before.
    """

    names: tuple[str, ...]
    before: float
    after: float
    kept: bool


class BlockTuner:
    """Tunes one block while it is quantized.

    The loss is the squared error of the block's output, relative to the squared length of the block's change to its input,
    token by token. Otherwise the few tokens with massive activations would be all that counts.

    Args:
        options: of the tuning; those whose names begin with "block" and `clip`, `norms`, `seed` are read.
        inputs: of the block. Their current hidden states are kept, those that come later are not used.

    Attributes:
        records: one for each group that was tuned.
    """

    def __init__(self, options: TuneOptions, inputs: BlockInputs):
        self.options = options
        self.inputs = type(inputs)(list(inputs.hidden), inputs.calls)
        self.train, self.held = split(options, [len(hidden) for hidden in inputs.hidden])
        self.targets: dict[int, torch.Tensor] = {}
        self.records: list[GroupRecord] = []

    def observe(self, batch: int, output: torch.Tensor) -> None:
        """Take the dense block's output [B, T, H] for one batch, if that batch is needed."""
        if batch in self.train or batch in self.held:
            self.targets[batch] = move(output.detach(), self.inputs.hidden[batch].device)

    @torch.inference_mode(False)
    @torch.enable_grad()
    def tune(self, block: nn.Module, names: Sequence[str], remaining: Sequence[str]) -> None:
        """Tune the block after a group of its linears was replaced.

        Args:
            block: quantized up to this group.
            names: of the linears in the group.
            remaining: names of the linears that will be rounded later, and are trained now.
        """
        dense = [name for name in remaining if is_dense_linear(block.get_submodule(name))]
        rate = self.options.block_learning_rate
        with (
            evaluating(block),
            tuned_module(block, lambda: self.inputs.call(block, self.held[0]), self.options.norms, dense) as student,
        ):
            before, at_first = self._held_out(block), student.snapshot()
            groups = student.groups(rate, rate * self.options.block_weight_rate)
            optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
            highest = [group["lr"] for group in optimizer.param_groups]
            order = self._order()
            for step, batch in enumerate(order):
                for group, lr in zip(optimizer.param_groups, highest, strict=True):
                    group["lr"] = lr * min(1.0, (step + 1) / 3) * 0.5 * (1 + math.cos(math.pi * step / len(order)))
                self._loss(block, batch).backward()
                torch.nn.utils.clip_grad_norm_(list(student.trained().values()), self.options.clip)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            after = self._held_out(block)
            kept = after < before  # False if it is not a number
            if not kept:
                student.load(at_first)
        self.records.append(GroupRecord(tuple(names), before, after, kept))
        logger.debug("Tuned after %s: %.4f before, %.4f after.", ", ".join(names), before, after)

    def _order(self) -> list[int]:
        generator = torch.Generator().manual_seed(self.options.seed)
        reads = max(1, round(self.options.block_epochs * len(self.train)))
        order: list[int] = []
        while len(order) < reads:
            order += [self.train[i] for i in torch.randperm(len(self.train), generator=generator).tolist()]
        return order[:reads]

    @torch.no_grad()
    def _held_out(self, block: nn.Module) -> float:
        return sum(self._loss(block, batch).item() for batch in self.held) / len(self.held)

    def _loss(self, block: nn.Module, batch: int) -> torch.Tensor:
        """The mean over the tokens of one batch."""
        found = self.inputs.run(block, batch).float()
        device = execution_device(block)
        entering, target = (move(x, device).float() for x in (self.inputs.hidden[batch], self.targets[batch]))
        added = (target - entering).square().sum(-1)
        # a token to which the block adds next to nothing does not count more than the median one
        return ((found - target).square().sum(-1) / added.clamp_min(added.median())).mean()


def split(options: TuneOptions, sizes: Sequence[int]) -> tuple[list[int], list[int]]:
    """The batches to train on and those to compare on, spread evenly over all.

    Args:
        options: `block_windows` to train on, and a quarter of their number, at least one batch, to compare on.
        sizes: windows in each batch.

    Returns:
        Numbers of batches; with a single batch it is in both.
    """
    per_batch = max(sizes)
    held = max(1, round(options.block_windows / 4 / per_batch))
    wanted = min(len(sizes), max(1, round(options.block_windows / per_batch)) + held)
    chosen = sorted({index * len(sizes) // wanted for index in range(wanted)})
    held = min(held, len(chosen) // 2)
    if held == 0:
        return chosen, chosen
    apart = {chosen[index * len(chosen) // held] for index in range(held)}
    return [batch for batch in chosen if batch not in apart], sorted(apart)
