"""The recorder of a model's calls of its blocks; `capture` uses it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from transformers.cache_utils import Cache

from .blocks import UNCALIBRATED, first_argument
from .device import move

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Passed(NamedTuple):
    """Stands for an argument of a block that is an output of the block before.

    Attributes:
        output: its number; 0 are the hidden states.
    """

    output: int


@dataclass
class BlockCall:
    """How the model called one block on one batch: everything but the hidden states.

    `args` are the positional arguments after the hidden states; `keyword` is the hidden states' name where the model
    passes them by keyword, None where they come first by position. An argument that is a further output of the block
    before (T5's position bias, or the tokens that one layer of sparse attention chooses for the next) is a [`Passed`].
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keyword: str | None = None


class NotBlockByBlock(ValueError):
    """The model does not run its decoder blocks one after the other on each other's output."""

    def __init__(self, reason: str):
        super().__init__(f"{reason}, so its decoder blocks cannot be calibrated one by one; {UNCALIBRATED}.")


class _LastBlockReached(Exception):
    """Ends the model's forward once the last block's arguments are known."""


class _OtherHiddenStates(Exception):
    """Ends the model's forward: a block did not get the output of the block before it."""


class _SharedTensors:
    """Keeps one copy of equal tensors: most blocks and batches get the same masks and rotary tables."""

    def __init__(self, device: torch.device, keeps_caches: bool = False):
        self.device, self.keeps_caches = device, keeps_caches
        self._stored: dict[tuple, list[torch.Tensor]] = {}
        self._seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by identity, within one forward

    def end_of_forward(self) -> None:
        self._seen.clear()

    def share(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._share_tensor(value)
        if isinstance(value, Cache):  # replaying into a filled cache would show a block its own past
            return value if self.keeps_caches else None
        if type(value) in (tuple, list):
            return type(value)(self.share(item) for item in value)
        if type(value) is dict:
            return {key: self.share(item) for key, item in value.items()}
        return value

    def _share_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) in self._seen:  # the entry holds the tensor, so its id is not reused
            return self._seen[id(tensor)][1]
        kept = move(tensor.detach(), self.device)
        same_form = self._stored.setdefault((kept.shape, kept.dtype), [])
        for other in same_form:
            if torch.equal(other, kept):
                kept = other
                break
        else:
            same_form.append(kept)
        self._seen[id(tensor)] = (tensor, kept)
        return kept


# Stands for the further outputs of a block without weights, to see whether a later block reads them.
_UNKNOWN = object()


class Recorder:
    """Replaces the forward of every block, records the arguments and passes the hidden states on.

    Blocks return a tensor in most models and a tuple in some. A tensor is tried first; the input that the model then
    gives to the second block shows whether it expected a tuple. Of blocks that return a tuple, and are in memory, the
    further outputs are computed and passed on, because later blocks may read them.
    """

    def __init__(self, blocks: nn.ModuleList, storage_device: torch.device, keeps_caches: bool = False):
        self.blocks = blocks
        self.tensors = _SharedTensors(storage_device, keeps_caches)
        self.hidden: list[torch.Tensor] = []
        self.calls: list[list[BlockCall]] = [[] for _ in blocks]
        self.as_tuple = False
        self.passes_more = False
        self._computes = False
        self._further: Any = None
        self._own_forwards = [block.forward for block in blocks]
        self._entering: torch.Tensor | None = None
        self._outputs: tuple = ()
        self._others = 1  # outputs besides the hidden states
        self._next = 0

    def installed(self) -> AbstractContextManager:
        """A context in which the blocks record how they are called."""
        return replaced_forwards(self.blocks, self._forward)

    def run(self, model: PreTrainedModel, **inputs: Any) -> None:
        """One forward of the model up to its last block."""
        for way in self._ways():
            self.as_tuple, self._computes, self._further = way
            failure = self._attempt(model, inputs)
            self.tensors.end_of_forward()
            self._outputs = ()
            if failure is None:
                break
            for calls in self.calls:
                del calls[len(self.hidden) :]
        else:
            raise NotBlockByBlock(f"{type(model).__name__} changes the hidden states between blocks") from failure
        self.hidden.append(move(self._entering, self.tensors.device))

    def _ways(self) -> list[tuple[bool, bool, Any]]:
        """What to try: whether blocks return a tuple, whether its further items are computed, and what they are if not."""
        if self.hidden:
            return [(self.as_tuple, self.passes_more, self._further)]
        in_memory = (
            not any(p.is_meta for block in self.blocks for p in block.parameters()) and not self.tensors.keeps_caches
        )
        further = (True, True, None) if in_memory else (True, False, _UNKNOWN)
        return [(False, False, None), further, (True, False, None)]

    def _attempt(self, model: PreTrainedModel, inputs: dict[str, Any]) -> Exception | None:
        """Run the model; return the error if the form of the blocks' output may be its cause."""
        self._entering, self._next = None, 0
        try:
            model(**inputs)
        except _LastBlockReached:
            return None
        except NotBlockByBlock:
            raise
        except Exception as error:
            if self._next == 0 and isinstance(error, TypeError):  # it needs other arguments
                raise NotBlockByBlock(
                    f"{type(model).__name__} cannot be run on the calibration data ({error}): it needs a list of the "
                    "model's own arguments as dataset"
                ) from error
            if self._next == 0:  # it failed before any block was called
                raise
            return error
        raise NotBlockByBlock(f"{type(model).__name__} calls only {self._next} of {len(self.blocks)} blocks")

    def _forward(self, index: int, block: nn.Module) -> Callable[..., Any]:
        name = first_argument(block)

        def forward(*args: Any, **kwargs: Any) -> Any:
            if index != self._next:
                raise NotBlockByBlock(f"Block {index} is called where block {self._next} is expected")
            keyword = None if args else name
            others = dict(kwargs)
            hidden = args[0] if args else others.pop(name, None)
            if index == 0:
                if not isinstance(hidden, torch.Tensor):
                    raise NotBlockByBlock(f"{type(block).__name__} takes no hidden states as its first argument")
                self._entering = hidden.detach()
            elif self._entering is None or not _equal(hidden, self._entering):
                raise _OtherHiddenStates
            own = tuple(self._recorded(value) for value in args[1:])
            self.calls[index].append(BlockCall(own, {k: self._recorded(v) for k, v in others.items()}, keyword))
            self._next += 1
            if self._next == len(self.blocks):
                raise _LastBlockReached
            if not self.as_tuple:
                return self._entering
            if self._computes:
                output = self._own_forwards[index](*args, **kwargs)
                self._outputs = tuple(output[1:]) if isinstance(output, (tuple, list)) else ()
                self._others = max(self._others, len(self._outputs))
            return (self._entering, *(self._outputs or (self._further,) * self._others))

        return forward

    def _recorded(self, value: Any) -> Any:
        """An argument as it is kept. Raises `NotBlockByBlock` for an output of a block that cannot be computed here."""
        if value is _UNKNOWN:
            raise NotBlockByBlock(
                "Blocks of this model read more outputs of the block before than its hidden states, which only "
                "`from_pretrained` passes on"
            )
        if isinstance(value, torch.Tensor):
            for number, output in enumerate(self._outputs):
                if value is output:
                    self.passes_more = True
                    return Passed(number + 1)
        return self.tensors.share(value)


def _equal(a: Any, b: torch.Tensor) -> bool:
    if not isinstance(a, torch.Tensor) or a.shape != b.shape or a.dtype != b.dtype:
        return False
    return a is b or torch.equal(a, b.to(a.device))


@contextmanager
def replaced_forwards(blocks: Iterable[nn.Module], make: Callable[[int, nn.Module], Callable[..., Any]]) -> Iterator[None]:
    """Replace the blocks' forward on the instances (accelerate keeps its hook there too) and put it back.

    Args:
        make: from a block's number and the block to its new forward.
    """
    before = [block.__dict__.get("forward") for block in blocks]
    try:
        for index, block in enumerate(blocks):
            block.forward = make(index, block)
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward
