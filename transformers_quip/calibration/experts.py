"""Hessians of the experts of a mixture: each from the tokens that were sent to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from ..nn.stacked_forward import StackedForward
from ..nn.stacks import READS, Stack, find_stacks
from . import processes
from .device import execution_device
from .hessian import HessianAccumulator
from .precision import autocast_dtype

# Bytes of Hessians that are collected at once; experts that do not fit wait for another pass over the block.
BUDGET = 4 << 30
# An expert's Hessian from c tokens of n numbers counts c / (c + BORROWED · n); the rest is its siblings'.
BORROWED = 0.5


class Part(NamedTuple):
    """Some experts of one projection: `experts`, of the projection `stack` of the module `module` of a block."""

    module: str
    stack: Stack
    experts: range

    @property
    def name(self) -> str:
        """Of the projection in the block."""
        return f"{self.module}.{self.stack.name}"


class WatchedExperts(StackedForward):
    """Dense experts that call back with the input of each projection of each expert.

    Args:
        module: Transformers' module of experts.
        callback: gets the name of the projection, the number of the expert and its input [..., columns].
    """

    def __init__(self, module: nn.Module, callback: Callable[[str, int, torch.Tensor], None]):
        super().__init__(module)
        self._dense, self._callback = (module,), callback

    def product(self, name: str, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """See [`StackedForward.product`]."""
        y, begin = x.new_zeros((len(x), self.stacks[name].rows)), 0
        for expert, end in enumerate(ends.tolist()):
            if end > begin:
                y[begin:end] = self.single(name, expert, x[begin:end])
                begin = end
        return y

    def single(self, name: str, expert: int, x: torch.Tensor) -> torch.Tensor:
        """See [`StackedForward.single`]."""
        self._callback(name, expert, x.detach())
        return nn.functional.linear(x, self.stacks[name].split(self._dense[0].get_parameter(name))[expert])


class ExpertHessians:
    """The Hessian of the input of every expert's projections, of one block, within a budget of memory.

    Args:
        block: with dense experts.
        modules: names of its modules of experts.
        prefix: the block's name in the model with a dot, for messages.
        budget: bytes of Hessians at once. At least one expert's are collected.

    Attributes:
        passes: the parts that are collected together, in the order of the passes over the block.
        tokens: name of a projection → tokens that each expert saw; known after the first pass.
    """

    def __init__(self, block: nn.Module, modules: Sequence[str], prefix: str = "", budget: int = BUDGET):
        self.prefix = prefix
        self._modules: dict[str, Any] = {name: block.get_submodule(name) for name in modules}
        self._stacks = {name: find_stacks(module) for name, module in self._modules.items()}
        self.passes = _passes(self._stacks, budget)
        self._pools: dict[str, HessianAccumulator] = {}
        self._sums: dict[tuple[str, int], HessianAccumulator] = {}
        self._pass = 0
        self._device = execution_device(block)
        self.forget()

    def forget(self) -> None:
        """Begin again."""
        stacks = [(name, stack) for name, found in self._stacks.items() for stack in found.values()]
        self.tokens = {f"{name}.{stack.name}": [0] * stack.experts for name, stack in stacks}
        self._energy = dict.fromkeys(self.tokens, 0.0)
        self._pools.clear()
        self._sums.clear()

    @contextmanager
    def watching(self, block: nn.Module, number: int) -> Iterator[None]:
        """A context in which the block collects the Hessians of one of the passes."""
        self._pass = number
        self._sums.clear()
        try:
            for name, module in self._modules.items():
                block.set_submodule(name, WatchedExperts(module, self._callback(name)))
            yield
        finally:
            for name, module in self._modules.items():
                block.set_submodule(name, module)

    def _callback(self, module: str) -> Callable[[str, int, torch.Tensor], None]:
        wanted = {(part.name, expert) for part in self.passes[self._pass] for expert in part.experts}

        def add(projection: str, expert: int, x: torch.Tensor) -> None:
            name, x = f"{module}.{projection}", x.to(autocast_dtype(x))
            if self._pass == 0:
                self._count(name, projection, expert, x)
            if (name, expert) in wanted:
                full_name = f"{self.prefix}{name}[{expert}]"
                found = self._sums.setdefault((name, expert), HessianAccumulator(x.shape[-1], x.device, full_name))
                found.add(x)

        return add

    def _count(self, name: str, projection: str, expert: int, x: torch.Tensor) -> None:
        self.tokens[name][expert] += x.numel() // x.shape[-1]
        self._energy[name] += x.double().square().sum().item()
        if projection in READS:  # all experts read tokens of one kind; what they compute has no common meaning
            self._pools.setdefault(name, HessianAccumulator(x.shape[-1], x.device, self.prefix + name)).add(x)

    def share(self) -> dict[str, int]:
        """Add the sums of all processes up after a pass, each expert's in the process that is to round it.

        Returns:
            [`key`] of each expert of the pass → process.
        """
        if self._pass == 0:
            self._share_counts()
        wanted = [(part, expert) for part in self.passes[self._pass] for expert in part.experts]
        costs = {}
        for part, expert in wanted:
            rows, columns = self.shape(part.name)[1:]
            costs[key(part.name, expert)] = float(columns**2 * (columns + rows))
        owners = processes.dealt(costs)
        for part, expert in wanted:
            tokens, owner = self.tokens[part.name][expert], owners[key(part.name, expert)]
            own = self._sums.pop((part.name, expert), None)
            if tokens == 0:
                continue
            own = own or self._empty(part.name, f"[{expert}]")
            own.add_up(tokens, owner)
            if owner == processes.rank():
                self._sums[part.name, expert] = own
        return owners

    def _share_counts(self) -> None:
        found = processes.gathered((self.tokens, self._energy))
        for name in self.tokens:
            self.tokens[name] = [sum(counts) for counts in zip(*(tokens[name] for tokens, _ in found), strict=True)]
            self._energy[name] = sum(energy[name] for _, energy in found)
            total = sum(self.tokens[name])
            if name.rpartition(".")[2] in READS and total:
                self._pools[name] = self._pools.get(name) or self._empty(name)
                self._pools[name].add_up(total)

    def _empty(self, name: str, which: str = "") -> HessianAccumulator:
        return HessianAccumulator(self.shape(name)[2], self._device, f"{self.prefix}{name}{which}")

    def pop(self, name: str, expert: int) -> torch.Tensor | None:
        """The Hessian float32 [n, n] of an expert of the pass, shrunk towards its siblings' the more, the fewer its tokens.

        Siblings' is: for a projection of the experts' common input, the Hessian of all their tokens; for the others, whose
        inputs are the expert's own, the same energy in every direction.

        Returns:
            None if no expert of this projection saw a token.

        Raises:
            ValueError: see [`HessianAccumulator.hessian`].
        """
        own, count = self._sums.pop((name, expert), None), self.tokens[name][expert]
        total = sum(self.tokens[name])
        if total == 0:
            return None
        pool, size = self._pools.get(name), self.shape(name)[2]
        found = None if own is None else own.hessian()
        if pool is not None:
            siblings = pool.hessian()
        else:
            energy = self._energy[name] / (total * size) if found is None else found.diagonal().mean().item()
            siblings = torch.eye(size) * energy
        if found is None:
            return siblings
        share = count / (count + BORROWED * size)
        return found.mul_(share).add_(siblings.to(found), alpha=1 - share)

    def shape(self, name: str) -> tuple[int, int, int]:
        """(experts, rows, columns) of a projection."""
        module, _, projection = name.rpartition(".")
        return self._stacks[module][projection].shape

    def borrowing(self) -> dict[str, tuple[int, int, int]]:
        """For each projection with experts that saw fewer tokens than they have inputs: (their number, all, fewest)."""
        result = {}
        for name, counts in self.tokens.items():
            few = [count for count in counts if count < self.shape(name)[2]]
            if few:
                result[self.prefix + name] = (len(few), len(counts), min(few))
        return result


def key(name: str, expert: int) -> str:
    """The name of an expert of a projection."""
    return f"{name}[{expert}]"


def _passes(stacks: Mapping[str, Mapping[str, Stack]], budget: int) -> list[list[Part]]:
    passes: list[list[Part]] = [[]]
    left = budget
    for module, projections in stacks.items():
        for stack in projections.values():
            size, begin = 8 * stack.columns**2, 0  # float64
            while begin < stack.experts:
                count = min(left // size, stack.experts - begin)
                if count < 1 and passes[-1]:
                    passes.append([])
                    left = budget
                    continue
                count = max(count, 1)
                passes[-1].append(Part(module, stack, range(begin, begin + count)))
                begin, left = begin + count, left - count * size
    return passes
