"""Perplexity of a causal language model over windows of token ids."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from tqdm.auto import tqdm

from ..calibration.arguments import without_cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def perplexity(model: PreTrainedModel, ids: torch.Tensor, batch_size: int = 4, bos: int | None = None) -> float:
    """Return exp of the mean next-token cross-entropy over all windows.

    Every window is read from its own beginning: its first token is given, each later token is predicted from those
    before it, so N windows of L tokens give N (L - 1) predictions, all with the same weight. Two figures can be
    compared only if windows, L and bos are the same.

    Args:
        model: a causal language model; it is run in eval mode and left in the mode it was in.
        ids: token ids [N, L], integer, N >= 1, L >= 2, without padding.
        batch_size: windows in one forward pass. Besides the logits of one batch, [batch_size, L, vocabulary] in the
            model's dtype, only one window's are held in float32.
        bos: token id to put before every window, for models that need it (Gemma); it is read, never predicted.

    Returns:
        The perplexity as a Python float; `inf` where the mean cross-entropy is too large for a float, `nan` where the
        model's logits are not finite.

    Raises:
        TypeError: ids is not an integer tensor.
        ValueError: ids is not [N >= 1, L >= 2], or batch_size < 1.
    """
    check_windows(ids, batch_size)
    length = ids.shape[1]
    device = input_device(model)
    training = model.training
    model.eval()
    total = 0.0
    try:
        for batch in tqdm(ids.to(torch.long).split(batch_size), desc="Perplexity", unit="batch", leave=False):
            inputs = batch if bos is None else torch.nn.functional.pad(batch, (1, 0), value=bos)
            logits = model(input_ids=inputs.to(device), **without_cache(model)).logits[:, -length:-1]
            for window, scores in zip(batch, logits, strict=True):
                targets = window[1:].to(scores.device)
                total += torch.nn.functional.cross_entropy(scores.float(), targets, reduction="sum").item()
            del logits  # before the next batch makes its own
    finally:
        model.train(training)
    mean = total / (ids.shape[0] * (length - 1))
    try:
        return math.exp(mean)
    except OverflowError:
        return math.inf


def input_device(model: PreTrainedModel) -> torch.device:
    """Where to put the token ids for a model."""
    # a first parameter that lies on disk is on the meta device; accelerate's hooks then place the inputs themselves
    return model.device if model.device.type != "meta" else torch.device("cpu")


def check_windows(ids: torch.Tensor, batch_size: int) -> None:
    """Raise `TypeError` or `ValueError` for anything but windows of token ids [N >= 1, L >= 2]."""
    if not isinstance(ids, torch.Tensor) or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        found = ids.dtype if isinstance(ids, torch.Tensor) else type(ids).__name__
        raise TypeError(f"ids must be an integer tensor of token ids [N, L], not {found}")
    if ids.ndim != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
        raise ValueError(f"ids must be [N, L] with N >= 1 and L >= 2, not {list(ids.shape)}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
