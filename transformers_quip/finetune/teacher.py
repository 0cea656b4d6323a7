"""The dense model's last hidden states over some windows, kept in a file: all that tuning needs of the dense model.

A file is raw bfloat16 [windows, tokens, hidden size], mapped into memory when it is read. A JSON file of the same name
records its shape, model and text. 256 windows of 512 tokens of a model with 576 hidden units take 151 MB; their logits
would take 13 GB.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm.auto import tqdm

from ..calibration.device import evaluating
from ..calibration.precision import fast_cpu_linears
from ..evaluation.kept import LogitMap, last_hidden_states, logit_map
from .head import Head
from .product import FrozenProduct, product_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# States that differ by less are of one model: bfloat16 alone rounds by up to 0.4 %.
_SAME = 0.01


@dataclass(frozen=True)
class Teacher:
    """The dense model as far as tuning needs it.

    Attributes:
        ids: token ids int64 [N, T] on the CPU.
        states: bfloat16 [N, T, n] on the CPU, mapped from a file or in memory.
        weight, bias: of the head, [V, n] in the dtype of products, and [V] or None.
        logits: the step after the head.
    """

    ids: torch.Tensor
    states: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    logits: LogitMap

    def head(self) -> Head:
        """The function from states to logits."""

        def project(hidden: torch.Tensor) -> torch.Tensor:
            z = FrozenProduct.apply(hidden.to(self.weight.device), self.weight)
            return z if self.bias is None else z + self.bias

        return Head(project, self.logits)


@torch.no_grad()
def record(
    model: PreTrainedModel,
    ids: torch.Tensor,
    path: str | os.PathLike | None = None,
    batch_size: int = 4,
    progress: bool = True,
) -> Teacher:
    """Run the dense model over windows of token ids and keep its last hidden states.

    Args:
        model: a causal language model; it is not changed.
        ids: token ids, integer [N, T], without padding.
        path: of the file for the states. An existing one is used if it was made from the same ids by a model of the same
            config, and if the first window still gives the same states. None: the states are kept in memory.
        batch_size: windows in one forward pass.
        progress: show a tqdm bar.

    Raises:
        ValueError: the model has no head, or one whose logits are not understood; or the states are not finite.
    """
    ids = ids.to(torch.long).cpu()
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} has no language modelling head, so it cannot teach")
    device = model.device
    with evaluating(model):
        found = logit_map(model, ids[:1, : min(ids.shape[1], 16)].to(device))
        fast = fast_cpu_linears(model) if product_dtype(device) == torch.bfloat16 else nullcontext()
        with fast:
            states = _states(model, ids, None if path is None else Path(path), batch_size, progress)
    dense = head.dequantize() if hasattr(head, "dequantize") else head.weight
    bias = getattr(head, "bias", None)
    weight = dense.detach().to(product_dtype(device)).clone()
    return Teacher(ids, states, weight, None if bias is None else bias.detach().float().clone(), found)


def _states(model: PreTrainedModel, ids: torch.Tensor, path: Path | None, batch_size: int, progress: bool) -> torch.Tensor:
    size = model.get_output_embeddings().weight.shape[1]
    shape = (*ids.shape, size)
    if path is None:
        return _fill(torch.empty(shape, dtype=torch.bfloat16), model, ids, batch_size, progress)
    description = {"shape": list(shape), "ids": _digest(ids), "config": _digest(_config(model))}
    note = path.with_suffix(".json")
    if note.is_file() and json.loads(note.read_text(encoding="utf-8")) == description:
        states = _mapped(path, shape)
        if _are_of(model, states[:1], ids[:1]):
            return states
    path.parent.mkdir(parents=True, exist_ok=True)
    note.unlink(missing_ok=True)  # it marks a complete file
    with path.open("wb") as file:
        file.truncate(2 * torch.Size(shape).numel())
    states = _fill(_mapped(path, shape), model, ids, batch_size, progress)
    temporary = note.with_suffix(".tmp")
    temporary.write_text(json.dumps(description), encoding="utf-8")
    os.replace(temporary, note)
    return states


def _are_of(model: PreTrainedModel, states: torch.Tensor, ids: torch.Tensor) -> bool:
    """Whether the model gives these states: another fine-tune has the same config but other weights."""
    found = last_hidden_states(model, ids.to(model.device)).float().cpu()
    return (found - states.float()).norm() <= _SAME * found.norm()


def _mapped(path: Path, shape: tuple[int, ...]) -> torch.Tensor:
    size = torch.Size(shape).numel()
    return torch.from_file(str(path), shared=True, size=size, dtype=torch.bfloat16).view(shape)


def _fill(states: torch.Tensor, model: PreTrainedModel, ids: torch.Tensor, batch_size: int, progress: bool) -> torch.Tensor:
    bar = tqdm(total=len(ids), desc="Reading with the dense model", unit="window", disable=not progress)
    with bar:
        for begin in range(0, len(ids), batch_size):
            batch = ids[begin : begin + batch_size]
            found = last_hidden_states(model, batch.to(model.device))
            if not found.isfinite().all():
                raise ValueError(
                    f"The last hidden states of {type(model).__name__} are NaN or Inf: load the dense model with "
                    "dtype=torch.float32 or torch.bfloat16"
                )
            states[begin : begin + len(batch)] = found.to(torch.bfloat16).cpu()
            bar.update(len(batch))
    return states


def _config(model: PreTrainedModel) -> str:
    """The architecture and its sizes; the weights are not compared."""
    return json.dumps(model.config.to_diff_dict(), sort_keys=True, default=str)


def _digest(value: torch.Tensor | str) -> str:
    data = value.encode() if isinstance(value, str) else value.contiguous().numpy().tobytes()
    return hashlib.sha256(data).hexdigest()
