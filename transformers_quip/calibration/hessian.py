"""Second moments of activations: the Hessian H = E[x xᵀ] of a linear's proxy loss (QuIP#, arXiv 2402.04396)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import nn

from ..nn.replace import linear_shape
from . import processes
from .capture import BlockInputs
from .device import execution_device
from .observe import Regroup, observe_linears
from .precision import autocast_dtype, cpu_matmul_precision

logger = logging.getLogger(__name__)

# Tokens in one float32 product: enough that adding it to the float64 sum is cheap, few enough that float32 rounding stays
# below 1e-6 and copies stay small.
_TOKENS = 4096
# Columns in one panel of the product: bounds the transient to _COLUMNS * size floats, and skips the lower triangle.
_COLUMNS = 256


class HessianAccumulator:
    """Accumulates the Hessian H = E[x xᵀ] over the tokens of many batches.

    Products are computed in float32 and summed in float64, upper triangle only. The sum takes 8·size² bytes (1.6 GB
    for 14336 columns), `hessian()` another 4·size²; the transient is a few MB.

    Args:
        size: the number of columns n.
        device: where to accumulate; inputs are moved there chunk by chunk. It must support float64.
        name: the module's name, for error messages.

    Attributes:
        tokens: the number of x summed so far.
    """

    def __init__(self, size: int, device: torch.device | str = "cpu", name: str = ""):
        self.size = size
        self.name = name or "the linear"
        self.tokens = 0
        self._sum = torch.zeros(size, size, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, x: torch.Tensor) -> None:
        """Add the tokens of x [..., n], of any float dtype.

        Raises:
            ValueError: another number of columns, or not floating point.
        """
        if x.shape[-1] != self.size or not x.is_floating_point():
            raise ValueError(
                f"Inputs of {self.name} must be floating point [..., {self.size}], got {list(x.shape)} of {x.dtype}."
            )
        x = x.reshape(-1, self.size)
        # The product of two bfloat16 numbers is exact in float32, in which oneDNN adds them up: exact, and faster.
        exact = cpu_matmul_precision("bf16" if x.dtype == torch.bfloat16 else "ieee")
        with exact, torch.autocast(self._sum.device.type, enabled=False):
            for tokens in x.split(_TOKENS):
                tokens = tokens.to(self._sum.device, torch.float32)
                for start in range(0, self.size, _COLUMNS):
                    rows = slice(start, start + _COLUMNS)
                    self._sum[rows, start:] += tokens[:, rows].T @ tokens[:, start:]
        self.tokens += len(x)

    def add_up(self, tokens: int, process: int | None = None) -> None:
        """Add the sums of all processes up, in all of them or in one; then the others' are lost.

        Args:
            tokens: the number of those of all processes.
            process: the one; None: all.
        """
        if process is None:
            processes.add_up_everywhere(self._sum)
        else:
            processes.add_up_on(process, self._sum)
        self.tokens = tokens

    @torch.no_grad()
    def hessian(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The mean of x xᵀ, [n, n], exactly symmetric.

        Raises:
            ValueError: no tokens were added, or an activation was NaN or Inf (every such value reaches the diagonal).
        """
        self._check()
        result = torch.empty(self.size, self.size, dtype=dtype, device=self._sum.device)
        for start in range(0, self.size, _COLUMNS):
            rows, after = slice(start, start + _COLUMNS), start + _COLUMNS
            panel = (self._sum[rows, start:] / self.tokens).to(dtype)
            square = panel[:, :_COLUMNS].triu()
            result[rows, rows] = square + square.triu(1).T
            result[rows, after:] = panel[:, _COLUMNS:]
            result[after:, rows] = panel[:, _COLUMNS:].T
        return result

    def _check(self) -> None:
        if self.tokens == 0:
            raise ValueError(f"No activations were seen for {self.name}: it did not run on the calibration data.")
        bad = ~self._sum.diagonal().isfinite()
        if bad.any():
            raise ValueError(
                f"The calibration inputs of {self.name} hold NaN or Inf in column {int(bad.nonzero()[0, 0])} (of "
                f"{self.size}; {int(bad.sum())} columns in all). The model overflows in its dtype, or its weights do: "
                "load it with dtype=torch.float32."
            )


class BlockHessians:
    """The Hessian of every input that the linears of one block read.

    Args:
        prefix: the block's name in the model with a dot, for messages.

    Attributes:
        groups: leader → the linears that read one input, the leader first ([`LinearObserver`]).
        accumulators: leader → the sum over its inputs.
    """

    def __init__(self, prefix: str = ""):
        self.prefix = prefix
        self.groups: dict[str, tuple[str, ...]] = {}
        self.accumulators: dict[str, HessianAccumulator] = {}

    def collect(
        self,
        block: nn.Module,
        names: Sequence[str],
        inputs: BlockInputs,
        on_output: Callable[[int, torch.Tensor], None] | None = None,
        on_restart: Callable[[], None] | None = None,
    ) -> BlockHessians:
        """Run the block over all batches, once.

        The first batch is run again if linears that share an input read others besides, or if the block fails under
        autocast.

        Args:
            block: with dense linears.
            names: of its linears to observe.
            inputs: of the block.
            on_output: gets the number and the block's output [B, T, H] of each batch, after that batch is done with.
            on_restart: called before the first batch is run again.

        Returns:
            self.

        Raises:
            ValueError: linears share an input in the first batch and not in a later one.
        """
        alone: list[str] = []
        while not self._collected(block, names, inputs, on_output, alone):
            self.accumulators.clear()
            if on_restart is not None:
                on_restart()
        return self

    def _collected(
        self,
        block: nn.Module,
        names: Sequence[str],
        inputs: BlockInputs,
        on_output: Callable[[int, torch.Tensor], None] | None,
        alone: list[str],
    ) -> bool:
        """Whether all batches could be run with these linears alone; if not, there is one more of them."""
        batch = 0
        try:
            with observe_linears(block, names, self._add, alone) as observer:
                for batch in range(inputs.num_batches):
                    output = inputs.call(block, batch)
                    if on_output is not None:
                        on_output(batch, output)
        except Regroup as error:
            if batch:  # earlier inputs may have been replaced by outputs
                raise ValueError(
                    f"{self.prefix}{error.name} reads the same input as other linears in the first batch and another one "
                    "later, so there are no statistics for it: leave it dense (modules_to_not_convert)"
                ) from None
            alone.append(error.name)
            return False
        except RuntimeError:
            if batch or not inputs.precision.gives_way(execution_device(block)):
                raise
            return False
        self.groups = observer.groups
        return True

    def pop(self, leader: str) -> torch.Tensor:
        """The Hessian float32 [n, n] of one input; its accumulator is freed.

        Raises:
            ValueError: see [`HessianAccumulator.hessian`].
        """
        accumulator = self.accumulators.pop(leader)
        if accumulator.tokens < accumulator.size:
            logger.warning(
                "%s: %d calibration tokens are too few for its %d inputs (its Hessian has no full rank): raise num_samples",
                ", ".join(self.prefix + name for name in self.groups[leader]),
                accumulator.tokens,
                accumulator.size,
            )
        return accumulator.hessian()

    def share(self, block: nn.Module) -> dict[str, int]:
        """Add the sums of all processes up, each in the process that is to round its group; the others free theirs.

        Each batch adds float32 numbers to float64 sums, which hold them exactly but for those below a 2^-29th of the sum.
        So the order of the sums, and the number of processes, do not change a float32 Hessian.

        Args:
            block: with dense linears.

        Returns:
            leader → process. `groups` has the groups of all processes then: an expert may have had tokens in one alone.

        Raises:
            ValueError: linears that read one input in one process do not in another.
        """
        found = processes.gathered(
            {leader: (names, self.accumulators[leader].tokens) for leader, names in self.groups.items()}
        )
        groups: dict[str, tuple[str, ...]] = {}
        for theirs in found:
            for leader, (names, _) in theirs.items():
                groups[leader] = tuple(dict.fromkeys((*groups.get(leader, ()), *names)))
        members = [name for names in groups.values() for name in names]
        twice = next((name for name in members if members.count(name) > 1), None)
        if twice is not None:
            raise ValueError(
                f"{self.prefix}{twice} reads the input of other linears in one process than in another: calibrate in one "
                "process"
            )
        shapes = {name: linear_shape(block.get_submodule(name)) for name in members}
        costs = {}
        for leader, names in groups.items():
            columns = shapes[leader][1]
            costs[leader] = float(columns**2 * (columns + sum(shapes[name][0] for name in names)))
        owners, device = processes.dealt(costs), execution_device(block)
        for leader in groups:
            own = self.accumulators.pop(leader, None)
            own = own or HessianAccumulator(shapes[leader][1], device, self.prefix + leader)
            own.add_up(sum(theirs[leader][1] for theirs in found if leader in theirs), owners[leader])
            if owners[leader] == processes.rank():
                self.accumulators[leader] = own
        self.groups = groups
        return owners

    def _add(self, leader: str, x: torch.Tensor) -> None:
        if leader not in self.accumulators:
            self.accumulators[leader] = HessianAccumulator(x.shape[-1], x.device, self.prefix + leader)
        # The numbers that the product really multiplies: under autocast, x in the lower precision.
        self.accumulators[leader].add(x.to(autocast_dtype(x)))
