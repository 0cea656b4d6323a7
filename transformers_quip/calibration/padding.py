"""Leave padding out of the calibration data: by its attention mask, or by repeated tokens at the ends of rows."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from .forms import Row

logger = logging.getLogger(__name__)


class Unpadding:
    """Takes the padding out of rows of token ids, and says once how much it found without a mask.

    If a row has a mask, the tokens that it hides are left out. Without a mask, padding is looked for at both ends of the
    row, never inside: a run of the pad token, or a run of two or more of one token, with which at least half of the rows
    end (or begin). A pad token that also begins or ends texts (many tokenizers pad with such a token) is kept once per run.

    Args:
        pads: the token ids that the model, or its tokenizer, pads with.
        marks: the token ids that begin or end a text.
    """

    def __init__(self, pads: set[int], marks: set[int]):
        self._pads = pads
        self._marks = marks
        self._found: Counter[int] = Counter()

    @classmethod
    def of(cls, model: Any, tokenizer: Any = None) -> Unpadding:
        """With the special tokens of a model's configs and of a tokenizer."""
        configs = [model.config.get_text_config(decoder=True), getattr(model, "generation_config", None), tokenizer]

        def named(name: str) -> set[int]:
            values = [getattr(config, name, None) for config in configs]
            ids = [one for value in values for one in (value if isinstance(value, (list, tuple)) else [value])]
            return {one for one in ids if isinstance(one, int)}

        return cls(named("pad_token_id"), named("bos_token_id") | named("eos_token_id"))

    def strip(self, rows: Sequence[Row]) -> list[torch.Tensor]:
        """The token ids of these rows without padding; rows that hold nothing else are left out."""
        pairs = [(row.ids, row.mask) for row in rows if row.ids is not None]
        bare = [ids for ids, mask in pairs if mask is None and len(ids)]
        starts, ends = (self._pads | _commonest(bare, last=last) for last in (False, True))
        kept = []
        for ids, mask in pairs:
            if mask is None:
                ids = self._cut(self._cut(ids, ends, last=True), starts, last=False)
            else:
                ids = ids[mask]
            if len(ids):
                kept.append(ids)
        return kept

    def _cut(self, ids: torch.Tensor, pads: set[int], last: bool) -> torch.Tensor:
        """Without the padding at one end."""
        if not len(ids) or (token := int(ids[-1 if last else 0])) not in pads:
            return ids
        run = _run(ids, last)
        is_mark = token in self._marks and run < len(ids)
        cut = run - 1 if is_mark else run
        self._found[token] += cut
        return ids[: len(ids) - cut] if last else ids[cut:]

    def report(self) -> None:
        """A warning about padding that was found without a mask, if there was any."""
        found = {token: count for token, count in self._found.items() if count}
        if found:
            tokens = ", ".join(f"{count} times token {token}" for token, count in sorted(found.items()))
            logger.warning(
                "dataset has no attention_mask, and its rows begin or end with tokens that look like padding (%s): they "
                "are left out. Give an attention_mask with the input_ids to say which tokens count.",
                tokens,
            )


def _run(ids: torch.Tensor, last: bool) -> int:
    """How many times the first or last token is repeated at that end."""
    other = (ids != ids[-1 if last else 0]).nonzero()
    if not len(other):
        return len(ids)
    return len(ids) - 1 - int(other[-1]) if last else int(other[0])


def _commonest(rows: Sequence[torch.Tensor], last: bool) -> set[int]:
    """The token of which at least half of the rows have two or more at that end; rows of one token alone do not count."""
    runs: Counter[int] = Counter()
    for ids in rows:
        if len(ids) > 2 and ids[-1 if last else 0] == ids[-2 if last else 1] and _run(ids, last) < len(ids):
            runs[int(ids[-1 if last else 0])] += 1
    return {token for token, count in runs.items() if count >= 2 and 2 * count >= len(rows)}
