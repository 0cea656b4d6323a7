"""Where the weights of a model are while it is quantized, and where the results go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..calibration import CapturedInputs

if TYPE_CHECKING:
    from ..config import QuipConfig


class Residence:
    """All weights are in memory, and the results stay there. `hf.streamed` has the other residence: on disk.

    A part of a model is named by the prefix of its modules, with a dot: "model.layers.3.".

    Attributes:
        shared: whether several processes quantize one model together, each with its batches of the data.
        quiet: whether this process shows no bars.
    """

    shared = False
    quiet = False

    def batches(self, count: int) -> Sequence[int]:
        """The numbers of the batches of this process, of `count`."""
        return range(count)

    def seconds(self) -> dict[str, float]:
        """The time that earlier runs have spent, by stage."""
        return {}

    def whole(self) -> AbstractContextManager:
        """A context in which the whole model can be run."""
        return nullcontext()

    def held(self) -> AbstractContextManager:
        """A context in which all weights are in memory, for derivatives."""
        return nullcontext()

    def results(self) -> AbstractContextManager:
        """A context in which the whole quantized model is in memory, to be trained; the trained values stay."""
        return nullcontext()

    def part(self, prefix: str) -> AbstractContextManager:
        """A context in which this part is in memory."""
        return nullcontext()

    def settled(self, settle: Callable[[], QuipConfig]) -> QuipConfig:
        """The config with the bits of each module: of an earlier run, or made now."""
        return settle()

    def sums(self) -> Path | None:
        """How the files begin that keep sums of gradients, for a run that resumes; None where nothing is kept."""
        return None

    def inputs(self, captured: CapturedInputs) -> CapturedInputs:
        """The inputs of the blocks, from the first block that is not finished on."""
        return captured

    def restore(self, prefix: str) -> list[dict[str, Any]] | None:
        """The records of a part that an earlier run has finished; its quantized modules are in their places then."""
        return None

    def finish(
        self,
        prefix: str,
        records: Sequence[dict[str, Any]],
        seconds: dict[str, float],
        inputs: CapturedInputs | None = None,
    ) -> None:
        """A part is finished.

        Args:
            prefix: of the part.
            records: of its modules.
            seconds: of the run until now, by stage.
            inputs: of the blocks, if the part is a block.
        """


IN_MEMORY = Residence()
