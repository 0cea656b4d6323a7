"""Pack documents of any length into token sequences of one length, without padding."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch

logger = logging.getLogger(__name__)


def pack(
    documents: Iterable[torch.Tensor], samples: int, length: int, seed: int, read_all: bool, held_out: int = 0
) -> torch.Tensor:
    """Join documents end to end, cut them into windows, and draw `samples` of these.

    Documents of exactly `length` tokens stay whole, each a window of its own.

    Args:
        documents: int64 [tokens] each.
        samples, length: of the windows.
        seed: of the draw.
        read_all: draw from all documents; else read only as many as are needed.
        held_out: the last `held_out` of the samples are others than those that are drawn without them.

    Returns:
        int64 [N, T]. N is less than `samples`, and T less than `length`, with a warning, where there is too little.

    Raises:
        ValueError: the documents have no token at all.
    """
    parts, found = [], 0
    for document in documents:
        parts.append(document)
        found += len(document)
        if not read_all and found >= samples * length:  # reading and tokenizing cost time: no more than needed
            break
    if found == 0:
        raise ValueError(
            "dataset is empty: it holds no token to calibrate on. (A generator can be read once only: give a list, or a "
            "new one for each model. Tokens that an attention_mask hides, and padding, do not count.)"
        )
    stream = torch.cat(parts)
    if found < length:
        logger.warning("dataset holds only %d tokens, less than one sequence of %d: calibrating on these.", found, length)
        return stream[None]
    windows = stream[: found // length * length].view(-1, length)
    if len(windows) < samples:
        logger.warning(
            "dataset holds only %d sequences of %d tokens, not num_samples=%d: calibrating on these.",
            len(windows), length, samples,
        )  # fmt: skip
    if len(windows) <= samples and not held_out:
        return windows.clone()
    drawn = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    fitted = max(min(samples, len(windows)) - held_out, 0)
    return windows[torch.cat([drawn[:fitted].sort().values, drawn[fitted:samples].sort().values])]
