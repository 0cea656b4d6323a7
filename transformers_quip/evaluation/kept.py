"""A model's predictions over some windows, kept without the model: its last hidden states and a copy of its head.

Two models are compared in this way without both in memory. 40 windows of 512 tokens of a model with 576 hidden units take
24 MB in bfloat16; their logits would take 2 GB.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from tqdm.auto import tqdm

from ..calibration.arguments import without_cache
from ..calibration.device import evaluating
from .perplexity import check_windows, input_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Largest error of logits computed from hidden states, relative to their largest magnitude.
_TOLERANCE = 1e-3
# Tokens of the forward pass that confirms how logits follow from hidden states.
_PROBE_TOKENS = 16


class UnknownHead(ValueError):
    """A model computes its logits from its last hidden states in an unknown way."""


@dataclass(frozen=True)
class LogitMap:
    """The last step of a model after its head: logits = cap · tanh(scale · z / cap), or scale · z without a cap.

    Attributes:
        scale: a factor (Cohere's `logit_scale`, one over Granite's `logits_scaling`).
        cap: Gemma's `final_logit_softcapping`, None for none.
    """

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, z: torch.Tensor) -> torch.Tensor:
        """The logits of these outputs of the head."""
        z = z if self.scale == 1.0 else z * self.scale
        return z if self.cap is None else (z / self.cap).tanh() * self.cap


@torch.no_grad()
def last_hidden_states(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """The input of the head, [B, T, n], for token ids [B, T]."""
    return model.base_model(input_ids=ids, **without_cache(model)).last_hidden_state


@torch.no_grad()
def logit_map(model: PreTrainedModel, ids: torch.Tensor) -> LogitMap:
    """How this model's logits follow from its head, found by its config and confirmed by one forward.

    Args:
        model: a causal language model.
        ids: token ids [1, T], a few.

    Raises:
        UnknownHead: they do not follow in a known way.
    """
    logits = model(input_ids=ids, **without_cache(model)).logits.float()
    z = model.get_output_embeddings()(last_hidden_states(model, ids)).float()
    config = model.config.get_text_config(decoder=True)
    cap = getattr(config, "final_logit_softcapping", None)
    scales = [1.0]
    if getattr(config, "logit_scale", None):
        scales.append(float(config.logit_scale))
    if getattr(config, "logits_scaling", None):
        scales.append(1 / float(config.logits_scaling))
    limit = _TOLERANCE * logits.abs().max().clamp_min(1e-6)
    for scale in scales:
        for found in (LogitMap(scale, cap), LogitMap(scale)):
            if (found(z) - logits).abs().max() <= limit:
                return found
    raise UnknownHead(
        f"{type(model).__name__} computes its logits from its output embeddings in an unknown way, so its last hidden "
        "states do not give its predictions: it cannot be tuned end to end (tune='vectors')"
    )


@dataclass(frozen=True)
class KeptPredictions:
    """A model's predictions over windows of text.

    Attributes:
        states: the last hidden states [N, T, n] in the model's dtype, on the CPU.
        weight, bias: of the head, [V, n], and [V] or None, on the model's device.
        logit_map: the step after the head.
    """

    states: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    logit_map: LogitMap

    @torch.no_grad()
    def logits(self, begin: int, end: int) -> torch.Tensor:
        """The logits of the windows from `begin` to `end`, [end - begin, T, V] in the dtype of the head."""
        states = self.states[begin:end].to(self.weight)
        return self.logit_map(nn.functional.linear(states, self.weight, self.bias))


@torch.no_grad()
def keep_predictions(model: PreTrainedModel, ids: torch.Tensor, batch_size: int = 4) -> KeptPredictions:
    """Read windows with a model, and keep its predictions.

    Args:
        model: a causal language model, dense or quantized; it is not changed.
        ids: token ids [N, T], integer, N >= 1, T >= 2, without padding.
        batch_size: windows in one forward pass.

    Raises:
        TypeError: ids is not an integer tensor.
        UnknownHead: the model has no head, or its logits do not follow from its last hidden states in a known way.
        ValueError: ids is not [N >= 1, T >= 2], or batch_size < 1.
    """
    check_windows(ids, batch_size)
    head = model.get_output_embeddings()
    if head is None or not hasattr(head, "weight") or head.weight.device.type == "meta":
        raise UnknownHead(
            f"{type(model).__name__} has no language modelling head in memory, so its predictions are not kept"
        )
    device, parts = input_device(model), []
    with evaluating(model):
        found = logit_map(model, ids[:1, :_PROBE_TOKENS].to(device))
        for batch in tqdm(ids.to(torch.long).split(batch_size), desc="Hidden states", unit="batch", leave=False):
            parts.append(last_hidden_states(model, batch.to(device)).cpu())
    weight = head.dequantize() if hasattr(head, "dequantize") else head.weight.detach().clone()
    bias = getattr(head, "bias", None)
    return KeptPredictions(torch.cat(parts), weight, None if bias is None else bias.detach().clone(), found)
