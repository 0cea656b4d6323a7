"""Hidden states in files that are mapped into memory: the system may write them out and read them again at any time.

A block reads one file and writes the next one, so the file that a finished block has written stays as it is
until the next block is finished: a run that is stopped continues from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .capture import CapturedInputs
from .mapped import mapped


class HiddenFile:
    """One file with the hidden states of all batches, one after the other.

    Args:
        path: of the file. One that is there must have the right size.
        shapes: of the batches, each [B, T, H].
        dtype: of all of them.
        new: whether to make the file; other processes may make the same file at the same time.

    Attributes:
        batches: tensors that are views of the file.

    Raises:
        OSError: the file cannot be made.
        ValueError: the file that is there has another size.
    """

    def __init__(self, path: Path, shapes: Sequence[Sequence[int]], dtype: torch.dtype, new: bool):
        self.path, self.dtype = path, dtype
        self.batches = mapped(path, shapes, dtype, new)


@dataclass
class MappedInputs(CapturedInputs):
    """[`CapturedInputs`] whose hidden states are in files: those before the current block, and those after it.

    Attributes:
        folder: of the files, `hidden-<block>.bin` with the states that enter that block.
        shapes: of all batches in a file.
        numbers: of the batches of this process among them.
        entering: the number of the block that the current file's states enter.
    """

    folder: Path = field(default_factory=Path)
    shapes: Sequence[Sequence[int]] = ()
    numbers: Sequence[int] = ()
    entering: int = 0
    _current: HiddenFile | None = None
    _next: HiddenFile | None = None

    @classmethod
    def of(
        cls,
        captured: CapturedInputs,
        folder: Path,
        shapes: Sequence[Sequence[int]],
        numbers: Sequence[int],
        entering: int = 0,
        dtype: torch.dtype | None = None,
    ) -> MappedInputs:
        """The same inputs with their hidden states in files.

        Args:
            captured: the states of this process's batches that enter block 0, which are copied to a file, and the calls.
            folder, shapes, numbers: see the attributes.
            entering: the block to continue with; from 1 on, its file must be there.
            dtype: of the states in that file.
        """
        kind = captured.hidden[0].dtype if dtype is None else dtype
        current = HiddenFile(_file(folder, entering), shapes, kind, new=entering == 0)
        hidden = [current.batches[number] for number in numbers]
        if entering == 0:
            for place, states in zip(hidden, captured.hidden, strict=True):
                place.copy_(states)
        device, as_tuple = captured.storage_device, captured.as_tuple
        known = (captured.calls, device, as_tuple, captured.precision)
        return cls(hidden, *known, folder, shapes, numbers, entering, current)

    def store(self, batch_index: int, output: torch.Tensor) -> None:
        """See [`CapturedInputs.store`]; the states that entered the block stay in their file."""
        if self._next is None:
            self._next = HiddenFile(_file(self.folder, self.entering + 1), self.shapes, output.dtype, new=True)
        place = self._next.batches[self.numbers[batch_index]]
        if output.dtype != place.dtype:
            raise ValueError(f"block {self.entering} returns {output.dtype} for one batch and {place.dtype} for another")
        self.hidden[batch_index] = place.copy_(output)

    def next_file(self) -> HiddenFile | None:
        """The file with the states that leave the current block; None after the last block."""
        return self._next

    def advance_file(self, delete: bool = True) -> None:
        """The block is finished and recorded: its file becomes the current one, and the one before is removed.

        Args:
            delete: whether this process is the one that removes it.
        """
        if self._current is not None and delete:
            self._current.path.unlink()
        self._current, self._next, self.entering = self._next, None, self.entering + 1


def _file(folder: Path, entering: int) -> Path:
    return folder / f"hidden-{entering}.bin"
