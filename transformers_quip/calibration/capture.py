"""Record how a model calls its decoder blocks.

Calibration goes block by block: with the hidden states that enter block ``i`` and the other arguments the model calls
it with, block ``i`` can be run alone, observed, quantized and run again, while the rest of the model is not run.
Nothing here knows an architecture by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm.auto import tqdm

from .arguments import without_cache
from .device import evaluating, execution_device, is_linear, move
from .inputs import Batch, input_device, keywords
from .precision import Precision
from .recorder import BlockCall, Passed, Recorder, replaced_forwards

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class BlockInputs:
    """Everything needed to run one block by itself: the hidden states that enter it, and the model's calls of it.

    Attributes:
        hidden: one tensor [B, T, H] for each batch, in the model's dtype.
        calls: one for each batch.
        precision: whether the block may run under autocast.
        passed: batch → all outputs of the block before but the hidden states, where this block reads them.
        leaving: where such outputs of this block are put, if the next block reads them.
    """

    hidden: Sequence[torch.Tensor]
    calls: Sequence[BlockCall]
    precision: Precision = field(default_factory=Precision)
    passed: Mapping[int, tuple] = field(default_factory=dict)
    leaving: dict[int, tuple] | None = None

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
        passed = self.passed.get(batch_index, ())
        args, kwargs = move(_filled(call.args, passed), device), move(_filled(call.kwargs, passed), device)
        with evaluating(block), self.precision.context(device):
            if call.keyword is None:
                output = block(hidden, *args, **kwargs)
            else:
                output = block(*args, **{call.keyword: hidden}, **kwargs)
        if not isinstance(output, (tuple, list)):
            return output
        if self.leaving is not None:
            self.leaving[batch_index] = move(tuple(output[1:]), self.hidden[batch_index].device)
        return output[0]


def _filled(arguments: Any, passed: tuple) -> Any:
    """Arguments with the outputs of the block before in their places."""
    if isinstance(arguments, dict):
        return {key: _filled((value,), passed)[0] for key, value in arguments.items()}
    return tuple(passed[value.output - 1] if isinstance(value, Passed) else value for value in arguments)


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
    # a block, what was passed to it, what it passes on
    _leaving: tuple[int, dict, dict] = field(init=False, default_factory=lambda: (-1, {}, {}))

    @property
    def num_blocks(self) -> int:
        return len(self.calls)

    @property
    def num_batches(self) -> int:
        return len(self.hidden)

    def of_block(self, block_index: int) -> BlockInputs:
        """The inputs of one block: the current hidden states (the same list), and the calls of that block."""
        later = self.calls[block_index + 1] if block_index + 1 < len(self.calls) else []
        read = any(isinstance(value, Passed) for call in later for value in (*call.args, *call.kwargs.values()))
        if self._leaving[0] != block_index:  # a block may be asked for several times
            self._leaving = (block_index, self._leaving[2], {})
        _, passed, leaving = self._leaving
        return BlockInputs(self.hidden, self.calls[block_index], self.precision, passed, leaving if read else None)

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


@torch.no_grad()
def capture_inputs(
    model: PreTrainedModel,
    blocks: nn.ModuleList,
    data: torch.Tensor | Sequence[Batch],
    batch_size: int,
    storage_device: torch.device | str = "cpu",
    progress: bool = True,
) -> CapturedInputs:
    """Record the hidden states that enter the first block, and the other arguments of every block.

    The model runs once a batch with every block's forward replaced by a recorder, and is stopped at the last block:
    only the embedding and the preparation of masks and positions are computed. Arguments may differ between blocks
    (Gemma-3 alternates between local and global attention) and are kept for each; equal tensors are kept once.

    Args:
        model: on any devices (accelerate's hooks work).
        blocks: a list that `find_blocks` or `find_block_lists` returned.
        data: token ids, int64 [N, T]; or batches, each of token ids or of the model's keyword arguments.
        batch_size: sequences in a batch of token ids [N, T].
        storage_device: where to keep hidden states and arguments.
        progress: show a tqdm bar.

    Raises:
        ValueError: the model does not call each block once, in order, on unchanged hidden states.
    """
    if isinstance(data, torch.Tensor) and (data.ndim != 2 or data.numel() == 0):
        raise ValueError(f"token_ids must be a non-empty [N, T] tensor, got shape {list(data.shape)}.")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    storage_device = torch.device(storage_device)
    device = input_device(model)
    recorder = Recorder(blocks, storage_device)
    batches: Sequence[Batch] = data.split(batch_size) if isinstance(data, torch.Tensor) else data
    with evaluating(model), recorder.installed():
        for batch in tqdm(batches, desc="Capturing block inputs", unit="batch", disable=not progress):
            recorder.run(model, **{**move(keywords(model, batch), device), **without_cache(model)})
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
    recorder = Recorder(blocks, device, keeps_caches=True)
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


def linear_names(block: nn.Module) -> Sequence[str]:
    """Dotted names, inside `block`, of its linears (`nn.Linear` and `Conv1D`), in the order of the module tree."""
    return tuple(name for name, module in block.named_modules() if is_linear(module))
