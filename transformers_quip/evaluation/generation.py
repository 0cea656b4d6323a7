"""Quality of the text that a model writes. Perplexity of given text does not show whether a model can write its own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .perplexity import check_windows, input_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Tokens of the pieces whose repetition is counted.
_PIECE = 4
# Sampling from all tokens, whatever the model's own settings cut off; greedy generation warns about them.
_UNCUT = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}


@dataclass(frozen=True)
class Generation:
    """Text that a model and a reference write after the same prompts.

    Attributes:
        perplexity: the reference's perplexity of the model's sampled text, given the prompts.
        own_perplexity: the same of the reference's own sampled text.
        repetition: the share of 4-token pieces in the model's greedy text that occurred in it before.
        own_repetition: the same of the reference's own greedy text.
        greedy: the model's greedy continuations, token ids [N, length].
    """

    perplexity: float
    own_perplexity: float
    repetition: float
    own_repetition: float
    greedy: torch.Tensor


@dataclass(frozen=True)
class Written:
    """The text that one model writes after some prompts.

    Attributes:
        sampled: its continuations at temperature 1, token ids [N, length].
        greedy: its greedy continuations, [N, length].
    """

    sampled: torch.Tensor
    greedy: torch.Tensor


def generation_quality(
    model: PreTrainedModel, reference: PreTrainedModel, prompts: torch.Tensor, length: int = 128, seed: int = 0
) -> Generation:
    """Let both models write, sampled at temperature 1 and greedily, and judge both by the reference.

    Args:
        model: such as the quantized model.
        reference: such as the dense model; of the same vocabulary.
        prompts: token ids, integer [N, P], N >= 1, P >= 2, without padding.
        length: tokens that are written after each prompt; a model's end-of-text token does not stop it.
        seed: of the sampling.

    Raises:
        TypeError: prompts is not an integer tensor.
        ValueError: prompts is not [N >= 1, P >= 2], or length is less than two pieces of 4 tokens.
    """
    return judge(reference, prompts, write(model, prompts, length, seed), seed)


@torch.no_grad()
def write(model: PreTrainedModel, prompts: torch.Tensor, length: int = 128, seed: int = 0) -> Written:
    """The first half of [`generation_quality`]: let one model write. The other model need not be in memory.

    Args, Raises:
        see [`generation_quality`].
    """
    check_windows(prompts, 1)
    if length < 2 * _PIECE:
        raise ValueError(f"length={length} must be at least {2 * _PIECE}")
    sampled, greedy = (_continuations(model, prompts, length, seed, sample) for sample in (True, False))
    return Written(sampled, greedy)


@torch.no_grad()
def judge(reference: PreTrainedModel, prompts: torch.Tensor, written: Written, seed: int = 0) -> Generation:
    """The second half of [`generation_quality`]: the reference judges the text, and writes as much itself.

    Args:
        reference, prompts, seed: see [`generation_quality`].
        written: the result of [`write`] for the other model with the same prompts and seed.
    """
    own = write(reference, prompts, written.greedy.shape[1], seed)
    return Generation(
        perplexity=_perplexity(reference, prompts, written.sampled),
        own_perplexity=_perplexity(reference, prompts, own.sampled),
        repetition=repeated_share(written.greedy),
        own_repetition=repeated_share(own.greedy),
        greedy=written.greedy,
    )


def repeated_share(text: torch.Tensor, piece: int = _PIECE) -> float:
    """The share of pieces of this many tokens that occurred before in the same row of token ids [N, T]."""
    repeated = total = 0
    for row in text.tolist():
        pieces = [tuple(row[i : i + piece]) for i in range(len(row) - piece + 1)]
        total += len(pieces)
        repeated += len(pieces) - len(set(pieces))
    return repeated / total


def _continuations(model: PreTrainedModel, prompts: torch.Tensor, length: int, seed: int, sample: bool) -> torch.Tensor:
    """Continuations [N, length] on the CPU; the global random state is restored."""
    prompts = prompts.to(input_device(model))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=sample,
            repetition_penalty=1.0,
            min_new_tokens=length,
            max_new_tokens=length,
            pad_token_id=0,
            **(_UNCUT if sample else {}),
        )
    return text[:, prompts.shape[1] :].cpu()


def _perplexity(model: PreTrainedModel, prompts: torch.Tensor, text: torch.Tensor) -> float:
    """exp of the mean cross-entropy of the text, given the prompts."""
    total = 0.0
    for prompt, row in zip(prompts, text, strict=True):
        ids = torch.cat([prompt.cpu(), row])[None].to(input_device(model))
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        total += torch.nn.functional.cross_entropy(logits, row.to(logits.device), reduction="sum").item()
    mean = total / text.numel()
    return math.exp(mean) if mean < 700 else math.inf
