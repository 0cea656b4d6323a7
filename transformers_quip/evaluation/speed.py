"""Speed of reading a prompt and of generation, in tokens per second."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .perplexity import input_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Speed:
    """Tokens per second, wall time.

    Attributes:
        prompt: speed of reading the prompt at once. written: speed of writing one token after another, the first included;
            batch 1, greedy.
        prompt_tokens, written_tokens: the numbers of tokens.
    """

    prompt: float
    written: float
    prompt_tokens: int
    written_tokens: int


@torch.no_grad()
def generation_speed(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int = 64) -> Speed:
    """Time one prompt and one greedy reply of exactly `new_tokens`, after a warm-up reply of two tokens.

    Args:
        prompt: token ids [1, T], integer.

    Raises:
        ValueError: the prompt is not [1, T >= 1], or new_tokens < 1.
    """
    if prompt.ndim != 2 or prompt.shape[0] != 1 or prompt.shape[1] < 1 or new_tokens < 1:
        raise ValueError(f"prompt must be [1, T] and new_tokens at least 1, not {list(prompt.shape)} and {new_tokens}")
    prompt = prompt.to(input_device(model))
    _timed(model, prompt, 2)
    reading = _timed(model, prompt, 1)
    whole = _timed(model, prompt, new_tokens + 1)
    writing = max(whole - reading, 1e-9)
    return Speed(prompt.shape[1] / reading, new_tokens / writing, prompt.shape[1], new_tokens)


def _timed(model: PreTrainedModel, prompt: torch.Tensor, tokens: int) -> float:
    _synchronize(prompt.device)
    start = time.perf_counter()
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        num_beams=1,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
    )
    _synchronize(prompt.device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
