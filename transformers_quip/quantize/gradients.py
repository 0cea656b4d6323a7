"""The Hessians of both sides within a run of two-sided rounding: which linears need them, and sums that survive a stop."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from .. import rounding
from ..calibration.curvature import BUDGET, Curvature, collect_curvature, sums_bytes
from ..calibration.inputs import GivenInputs
from .plan import QuantizationPlan
from .residence import Residence
from .state import write_tensors

if TYPE_CHECKING:
    from ..config import QuipConfig


def two_sided(plan: QuantizationPlan, config: QuipConfig) -> list[str]:
    """The linears of a plan whose rounding method reads the Hessians of both sides."""
    others = {*plan.embeddings, *plan.stacks}
    linears = [name for name in plan.names if name not in others]
    return [name for name in linears if rounding.get(config.for_module(name).rounding).two_sided]


def seconds_and_bytes(
    shapes: Sequence[tuple[int, int]], config: QuipConfig, tokens: int, forward: float, multiply: float
) -> tuple[float, int]:
    """What the Hessians of both sides cost.

    Args:
        shapes: of the linears that need them.
        config: `sketch` and `sketch_samples` are read.
        tokens: in a sequence.
        forward: seconds for running one sequence through all blocks.
        multiply: seconds for one multiplication and addition.

    Returns:
        Seconds, and the bytes of all sums.
    """
    size = sum(sums_bytes(rows, columns, config.sketch) for rows, columns in shapes)
    if config.sketch == "B":
        products = sum(rows * columns * (tokens + rows + columns) for rows, columns in shapes)
    else:
        products = tokens * size // 4
    passes = -(-size // BUDGET)
    # a backward pass to the activations takes as long as the forward pass
    return config.sketch_samples * (2 * forward * passes + products * multiply), size


def curvature_of(
    model: nn.Module, names: Sequence[str], config: QuipConfig, ids: torch.Tensor | GivenInputs, residence: Residence
) -> dict[str, Curvature]:
    """The Hessians of both sides of the linears of [`two_sided`], see [`collect_curvature`].

    Raises:
        ValueError: the data are not token ids.
    """
    if not isinstance(ids, torch.Tensor):
        raise ValueError(
            f"rounding={config.rounding!r} needs gradients of predictions of token ids: give token ids or texts"
        )
    beginning = residence.sums()
    kept = KeptSums(beginning) if beginning is not None else None
    with residence.held():
        return collect_curvature(
            model,
            names,
            ids[: config.sketch_samples],
            config.seed,
            sketch=config.sketch,
            progress=not residence.quiet,
            kept=kept,
        )


class KeptSums:
    """Sums of gradients on the disk: those of each pass in a file, which is written again from time to time.

    Args:
        beginning: of the names of the files.
        every: seconds between two writes, at least; and writing takes at most a twentieth of the time.
    """

    def __init__(self, beginning: Path, every: float = 60.0):
        self._beginning, self._every = beginning, every
        self._next = time.monotonic() + every

    def _path(self, number: int) -> Path:
        return self._beginning.with_name(f"{self._beginning.name}-{number}.safetensors")

    def read(self, number: int, sums: Mapping[str, Curvature]) -> int:
        """Fill in the sums of a pass, and return the number of sequences in them; 0 where nothing is kept.

        Raises:
            ValueError: the file cannot be read, or is of other linears.
        """
        path = self._path(number)
        if not path.is_file():
            return 0
        try:
            with safe_open(path, "pt") as file:
                done = int((file.metadata() or {})["done"])
                for name, found in sums.items():
                    for side, tensor in _sides(found).items():
                        tensor.copy_(file.get_tensor(f"{name}.{side}"))
                    found.sequences = int(file.get_tensor(f"{name}.sequences"))
        except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path} is damaged ({error}): --fresh starts the run again") from None
        return done

    def keep(self, number: int, sums: Mapping[str, Curvature], done: int, last: bool) -> None:
        """Write the sums of a pass over `done` sequences, if it is time or the pass is over.

        Raises:
            OSError: the disk is full, for example.
        """
        begin = time.monotonic()
        if begin < self._next and not last:
            return
        tensors: dict[str, torch.Tensor] = {}
        for name, found in sums.items():
            tensors |= {f"{name}.{side}": tensor for side, tensor in _sides(found).items()}
            tensors[f"{name}.sequences"] = torch.tensor(found.sequences)
        write_tensors(self._path(number), tensors, {"done": str(done)})
        end = time.monotonic()
        self._next = end + max(self._every, 19 * (end - begin))


def _sides(found: Curvature) -> dict[str, torch.Tensor]:
    """The sums by the names that they have in a file."""
    sides = {"out": found.hessian_out}
    return sides if found.hessian_in is None else {**sides, "in": found.hessian_in}
