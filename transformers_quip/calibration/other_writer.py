"""Text that another model writes: a smaller one, for a model that would take long to write its own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from . import tokenizer as tokenizers
from .packing import pack
from .tokenizer import Source

logger = logging.getLogger(__name__)

PREFIX = "self:"
# Another tokenizer may need fewer tokens for the same text.
_SPARE = 1.5


def written_by_another(
    name: str,
    shape: tuple[int, int],
    seed: int,
    held_out: int,
    tokenizer: Any,
    source: Source,
    document_length: int,
    write: Callable[[Any, int, int], torch.Tensor],
) -> torch.Tensor:
    """Token ids of text that the model `name` writes, for another model.

    If both have the same vocabulary, its tokens are used as they are. Otherwise its text is tokenized again.

    Args:
        name: folder, or id on the Hub, of a causal language model that fits into memory.
        shape: (sequences, tokens).
        seed: random seed.
        held_out: see [`pack`].
        tokenizer: of the model to calibrate; None: its own, from `source`.
        source: of the model to calibrate; the writer is read with the same token and cache.
        document_length: tokens in a document.
        write: makes a number of sequences of a number of tokens with a model: [`write_text`].

    Returns:
        int64 [N, T] on the CPU.

    Raises:
        ValueError: a tokenizer cannot be loaded, or the writer cannot write.
        OSError: there is no such model.
    """
    samples, length = shape
    access = {key: source.arguments[key] for key in ("cache_dir", "local_files_only", "token") if key in source.arguments}
    theirs = tokenizers.find_tokenizer(name, source)
    own = tokenizers.find_tokenizer(tokenizer, source)
    writer = AutoModelForCausalLM.from_pretrained(name, dtype="auto", **access)
    if own.get_vocab() == theirs.get_vocab():
        return write(writer, samples, length)
    logger.info("%s has another vocabulary, so its text is tokenized again.", name)
    written = write(writer, round(_SPARE * samples), length)
    del writer
    texts = theirs.batch_decode(written.flatten().split(min(document_length, length)), skip_special_tokens=True)
    return pack(_encoded(own, texts), samples, length, seed, read_all=False, held_out=held_out)


def _encoded(tokenizer: Any, texts: list[str]) -> Iterator[torch.Tensor]:
    for ids, _ in tokenizers.encode(tokenizer, [text for text in texts if text.strip()]):
        yield ids
