"""Record how a model calls its decoder blocks.

Calibration goes block by block: with the hidden states that enter block ``i`` and the other arguments the model calls
it with, block ``i`` can be run alone, observed, quantized and run again, while the rest of the model is not run.
Nothing here knows an architecture by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers.cache_utils import Cache

from .arguments import without_cache
from .blocks import UNCALIBRATED, first_argument
from .device import evaluating, execution_device, is_linear, move
from .precision import Precision

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class BlockCall:
    """How the model called one block on one batch: everything but the hidden states.

    `args` are the positional arguments after the hidden states; `keyword` is the hidden states' name where the model
    passes them by keyword, None where they come first by position.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keyword: str | None = None


@dataclass
class BlockInputs:
    """Everything needed to run one block by itself: the hidden states that enter it, and the model's calls of it.

    Attributes:
        hidden: one tensor [B, T, H] for each batch, in the model's dtype.
        calls: one for each batch.
        precision: whether the block may run under autocast.
    """

    hidden: Sequence[torch.Tensor]
    calls: Sequence[BlockCall]
    precision: Precision = field(default_factory=Precision)

    @property
    def num_batches(self) -> int:
        return len(self.hidden)

    @torch.no_grad()
    def call(self, block: nn.Module, batch_index: int) -> torch.Tensor:
        """Run the block as the model runs it, on the hidden states of one batch.

        Inputs are moved to the block's execution device. Returns the block's hidden states [B, T, H], on that device.
        """
        return self.run(block, batch_index)

    def run(self, block: nn.Module, batch_index: int) -> torch.Tensor:
        """The same with a graph for derivatives."""
        call = self.calls[batch_index]
        device = execution_device(block)
        hidden = move(self.hidden[batch_index], device)
        args, kwargs = move(call.args, device), move(call.kwargs, device)
        with evaluating(block), self.precision.context(device):
            if call.keyword is None:
                output = block(hidden, *args, **kwargs)
            else:
                output = block(*args, **{call.keyword: hidden}, **kwargs)
        return output[0] if isinstance(output, (tuple, list)) else output


@dataclass
class CapturedInputs:
    """The hidden states on their way through the blocks, batch by batch, and the recorded calls of every block.

    Attributes:
        hidden: one tensor [B, T, H] for each batch, in the model's dtype, on `storage_device`: at first the inputs of
            block 0. `store` and `advance` replace them once a block is done.
        calls: calls[block][batch]. Equal tensors are stored once.
        storage_device: where hidden states and arguments wait between calls.
        as_tuple: whether the blocks return a tuple, whose first item is the hidden states.
        precision: whether the blocks may run under autocast.
    """

    hidden: list[torch.Tensor]
    calls: list[list[BlockCall]]
    storage_device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    as_tuple: bool = False
    precision: Precision = field(default_factory=Precision)

    @property
    def num_blocks(self) -> int:
        return len(self.calls)

    @property
    def num_batches(self) -> int:
        return len(self.hidden)

    def of_block(self, block_index: int) -> BlockInputs:
        """The inputs of one block: the current hidden states (the same list), and the calls of that block."""
        return BlockInputs(self.hidden, self.calls[block_index], self.precision)

    def store(self, batch_index: int, output: torch.Tensor) -> None:
        """Replace the hidden states of one batch by the output of a block."""
        self.hidden[batch_index] = move(output, self.storage_device)

    def advance(self, block_index: int, block: nn.Module, batches: Iterable[int] | None = None) -> None:
        """Replace the hidden states by the block's outputs, batch after batch: the inputs of the next block.

        Args:
            batches: indices of the batches to advance; None: all.
        """
        inputs = self.of_block(block_index)
        for batch_index in range(self.num_batches) if batches is None else batches:
            self.store(batch_index, inputs.call(block, batch_index))


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


class _Recorder:
    """Replaces the forward of every block, records the arguments and passes the hidden states on.

    Blocks return a tensor in most models and a tuple in some. A tensor is tried first; the input that the model then
    gives to the second block shows whether it expected a tuple.
    """

    def __init__(self, blocks: nn.ModuleList, storage_device: torch.device, keeps_caches: bool = False):
        self.blocks = blocks
        self.tensors = _SharedTensors(storage_device, keeps_caches)
        self.hidden: list[torch.Tensor] = []
        self.calls: list[list[BlockCall]] = [[] for _ in blocks]
        self.as_tuple = False
        self._entering: torch.Tensor | None = None
        self._next = 0

    def installed(self) -> AbstractContextManager:
        """A context in which the blocks record how they are called."""
        return replaced_forwards(self.blocks, self._forward)

    def run(self, model: PreTrainedModel, **inputs: Any) -> None:
        """One forward of the model up to its last block."""
        for as_tuple in (self.as_tuple,) if self.hidden else (False, True):
            self.as_tuple = as_tuple
            failure = self._attempt(model, inputs)
            self.tensors.end_of_forward()
            if failure is None:
                break
            for calls in self.calls:
                del calls[len(self.hidden) :]
        else:
            raise NotBlockByBlock(f"{type(model).__name__} changes the hidden states between blocks") from failure
        self.hidden.append(move(self._entering, self.tensors.device))

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
            hidden = args[0] if args else kwargs.pop(name, None)
            if index == 0:
                if not isinstance(hidden, torch.Tensor):
                    raise NotBlockByBlock(f"{type(block).__name__} takes no hidden states as its first argument")
                self._entering = hidden.detach()
            elif self._entering is None or not _equal(hidden, self._entering):
                raise _OtherHiddenStates
            self.calls[index].append(BlockCall(self.tensors.share(tuple(args[1:])), self.tensors.share(kwargs), keyword))
            self._next += 1
            if self._next == len(self.blocks):
                raise _LastBlockReached
            return (self._entering, None) if self.as_tuple else self._entering

        return forward


def _equal(a: Any, b: torch.Tensor) -> bool:
    if not isinstance(a, torch.Tensor) or a.shape != b.shape or a.dtype != b.dtype:
        return False
    return a is b or torch.equal(a, b.to(a.device))


@torch.no_grad()
def capture_inputs(
    model: PreTrainedModel,
    blocks: nn.ModuleList,
    token_ids: torch.Tensor,
    batch_size: int,
    storage_device: torch.device | str = "cpu",
    progress: bool = True,
) -> CapturedInputs:
    """Record the hidden states that enter the first decoder block, and the other arguments of every block.

    The model runs once a batch with every block's forward replaced by a recorder, and is stopped at the last block:
    only the embedding and the preparation of masks and positions are computed. Arguments may differ between blocks
    (Gemma-3 alternates between local and global attention) and are kept for each; equal tensors are kept once.

    Args:
        model: the causal model, on any devices (accelerate's hooks work).
        blocks: the list that `find_blocks` returned.
        token_ids: int64 [N, T].
        batch_size: sequences a batch.
        storage_device: where to keep hidden states and arguments.
        progress: show a tqdm bar.

    Raises:
        ValueError: the model does not call each block once, in order, on unchanged hidden states.
    """
    if token_ids.ndim != 2 or token_ids.numel() == 0:
        raise ValueError(f"token_ids must be a non-empty [N, T] tensor, got shape {list(token_ids.shape)}.")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    storage_device = torch.device(storage_device)
    device = execution_device(model.get_input_embeddings())
    recorder = _Recorder(blocks, storage_device)
    batches = token_ids.split(batch_size)
    with evaluating(model), recorder.installed():
        for batch in tqdm(batches, desc="Capturing block inputs", unit="batch", disable=not progress):
            recorder.run(model, input_ids=batch.to(device), **without_cache(model))
    return CapturedInputs(recorder.hidden, recorder.calls, storage_device, recorder.as_tuple)


@torch.no_grad()
def record_calls(
    model: PreTrainedModel, blocks: nn.ModuleList, token_ids: torch.Tensor, arguments: dict[str, Any]
) -> tuple[torch.Tensor, list[BlockCall], bool]:
    """The states that enter the first block for one batch, how each block is called, and whether blocks return tuples.

    A key/value cache is passed on as it is, so the calls can be made once, in their order.

    Args:
        model, blocks: as for [`capture_inputs`].
        token_ids: int64 [B, T].
        arguments: further keywords of the model.
    """
    device = execution_device(model.get_input_embeddings())
    recorder = _Recorder(blocks, device, keeps_caches=True)
    with recorder.installed():
        recorder.run(model, input_ids=token_ids.to(device), **arguments)
    return recorder.hidden[0], [calls[0] for calls in recorder.calls], recorder.as_tuple


@torch.no_grad()
def run_after_blocks(
    model: PreTrainedModel, blocks: nn.ModuleList, token_ids: torch.Tensor, hidden: torch.Tensor, as_tuple: bool
) -> Any:
    """Run a model without its blocks, on the hidden states that the last block returns; returns the model's output.

    Args:
        model, blocks: as for [`capture_inputs`]; the blocks may be without weights.
        token_ids: int64 [B, T], of the batch that the states belong to.
        hidden: [B, T, H].
        as_tuple: see [`CapturedInputs`].
    """
    device = execution_device(model.get_input_embeddings())
    hidden = hidden.to(device)
    output = (hidden, None) if as_tuple else hidden
    with evaluating(model), replaced_forwards(blocks, lambda *_: lambda *_, **__: output):
        return model(input_ids=token_ids.to(device), **without_cache(model))


@contextmanager
def replaced_forwards(blocks: nn.ModuleList, make: Callable[[int, nn.Module], Callable[..., Any]]) -> Iterator[None]:
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


def linear_names(block: nn.Module) -> Sequence[str]:
    """Dotted names, inside `block`, of its linears (`nn.Linear` and `Conv1D`), in the order of the module tree."""
    return tuple(name for name, module in block.named_modules() if is_linear(module))
