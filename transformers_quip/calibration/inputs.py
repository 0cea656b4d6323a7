"""The keyword arguments with which a model is calibrated: made of token ids, or given by the caller."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .device import execution_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Keys of a row that `forms.read_rows` reads as token ids. A row with another tensor is a call of the model.
_OF_TEXT = {"input_ids", "attention_mask", "token_type_ids", "special_tokens_mask", "labels", "length"}

Batch = torch.Tensor | Mapping[str, Any]


def keywords(model: PreTrainedModel, batch: Batch) -> dict[str, Any]:
    """The arguments of the model's forward for a batch: token ids [B, T], or the arguments themselves.

    The decoder of an encoder-decoder model reads the same ids as its encoder.
    """
    if isinstance(batch, Mapping):
        return dict(batch)
    encodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return {"input_ids": batch, "decoder_input_ids": batch} if encodes else {"input_ids": batch}


def input_device(model: PreTrainedModel) -> torch.device:
    """The device on which the model takes its inputs: that of its input embeddings, where it has some."""
    try:
        table = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        table = None
    return execution_device(table if isinstance(table, torch.nn.Module) else model)


def are_calls(dataset: Any) -> bool:
    """Whether a data set is a list of the model's own keyword arguments: dictionaries with tensors other than text's."""
    if not isinstance(dataset, (list, tuple)) or not dataset:
        return False
    first = dataset[0]
    return isinstance(first, Mapping) and any(
        isinstance(value, torch.Tensor) and key not in _OF_TEXT for key, value in first.items()
    )


class GivenInputs(Sequence[Mapping[str, Any]]):
    """Batches of keyword arguments that the caller has given, as they are.

    Args:
        calls: each has tensors with the batch as first dimension.
        most: sequences to use.

    Raises:
        ValueError: one of them is not a dictionary with tensors.

    Attributes:
        sequences: their number.
        tokens: the size of all integer tensors of ids, of the decoder where there is one.
    """

    def __init__(self, calls: Sequence[Any], most: int):
        self._calls: list[Mapping[str, Any]] = []
        self.sequences = self.tokens = 0
        for index, call in enumerate(calls):
            tensors = {k: v for k, v in call.items() if isinstance(v, torch.Tensor)} if isinstance(call, Mapping) else {}
            if not tensors or any(v.ndim == 0 for v in tensors.values()):
                raise ValueError(
                    f"dataset[{index}] must be a dictionary of the model's arguments, with tensors whose first dimension "
                    "is the batch"
                )
            if self.sequences >= most:
                break
            self._calls.append(call)
            self.sequences += len(next(iter(tensors.values())))
            ids = tensors.get("decoder_input_ids", tensors.get("input_ids"))
            self.tokens += 0 if ids is None else ids.numel()

    def __len__(self) -> int:
        return len(self._calls)

    def __getitem__(self, index: Any) -> Any:
        return self._calls[index]

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return iter(self._calls)


def split(data: torch.Tensor | GivenInputs, size: int) -> list[Batch]:
    """Batches of this many sequences; given ones are as they are."""
    return list(data.split(size)) if isinstance(data, torch.Tensor) else list(data)


def counts(data: torch.Tensor | GivenInputs) -> tuple[int, int]:
    """(sequences, tokens)."""
    return (data.shape[0], data.numel()) if isinstance(data, torch.Tensor) else (data.sequences, data.tokens)
