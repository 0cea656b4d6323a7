"""Evaluation text, as windows of token ids."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Data sets by name: (repository, config, split) of the test text, joined with blank lines, as is usual.
_NAMED = {"wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")}
_TEXTS_AT_ONCE = 1_000_000  # characters


def evaluation_windows(
    source: str, model: PreTrainedModel, tokenizer: Any, count: int, length: int, seed: int = 0
) -> tuple[torch.Tensor, str]:
    """The first `count` windows of `length` tokens of a text.

    The text is tokenized without special tokens and cut end to end; nothing is shuffled or padded, and a last window that
    is not full is left out.

    Args:
        source: the path of a text file in UTF-8; "wikitext2" (its test split, fetched from the Hub); or "self": text that
            `model` writes, which measures only how close another model is to it.
        tokenizer: the model's; None will do for "self".

    Returns:
        (int64 [N <= count, length], one phrase that describes it).

    Raises:
        ValueError: an unknown source, no tokenizer, or text for less than one window.
        ImportError: see [`check_source`].
    """
    if count < 1 or length < 2:
        raise ValueError(f"there must be at least 1 window of at least 2 tokens, not {count} of {length}")
    if source == "self":
        from ..calibration.synthetic import write_text

        return write_text(model, count, length, seed), f"{count} windows of {length} tokens written by the reference model"
    if tokenizer is None:
        raise ValueError(f"the model's folder has no tokenizer, which the text {source!r} needs; 'self' does not need one")
    ids = _tokenize(_read(source), tokenizer, count * length)
    if len(ids) < length:
        raise ValueError(f"{source} has {len(ids)} tokens, less than one window of {length}")
    windows = torch.tensor(ids[: len(ids) // length * length], dtype=torch.long).view(-1, length)[:count]
    name = source if source in _NAMED else Path(source).name
    return windows, f"{name}, {len(windows)} windows of {length} tokens"


def check_source(source: str) -> None:
    """Refuse a source that [`evaluation_windows`] cannot read, before a model is loaded.

    Raises:
        ValueError: it is neither a text file nor a known name.
        ImportError: it is a known name, and the package that fetches it is not installed.
    """
    if Path(source).is_file() or source == "self":
        return
    if source not in _NAMED:
        raise ValueError(f"{source!r} is neither a text file nor one of 'self', {', '.join(map(repr, _NAMED))}")
    if importlib.util.find_spec("datasets") is None:
        raise ImportError(f"{source} needs the package datasets: pip install 'transformers-quip[data]'")


def _read(source: str) -> str:
    check_source(source)
    if Path(source).is_file():
        return Path(source).read_text(encoding="utf-8")
    from datasets import load_dataset

    repository, config, split = _NAMED[source]
    return "\n\n".join(load_dataset(repository, config, split=split)["text"])


def _tokenize(text: str, tokenizer: Any, enough: int) -> list[int]:
    """Only as many tokens as needed: tokenizers are slow on a whole book at once."""
    ids: list[int] = []
    for begin in range(0, len(text), _TEXTS_AT_ONCE):
        ids += tokenizer(text[begin : begin + _TEXTS_AT_ONCE], add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= enough:
            break
    return ids
