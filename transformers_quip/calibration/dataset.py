"""Token ids for calibration from everything that the option `dataset` may be."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from . import tokenizer as tokenizers
from .forms import ALLOWED, Row, Rows, read_rows
from .inputs import GivenInputs, are_calls
from .other_writer import PREFIX, written_by_another
from .packing import pack
from .padding import Unpadding
from .synthetic import Writer, write_text
from .tokenizer import Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# Text that the model writes itself is packed from documents of this length. They take half the time of documents that
# fill a window, because attention over long caches is slow, and there are more different beginnings.
DOCUMENT_LENGTH = 128
# The first tokens after the random one are greedy: with them, the perplexity of the quantized SmolLM2 was 5 % lower than
# without (96 x 512 tokens). A temperature of 0.8, longer documents, or the start token instead of a random one were worse.
_GREEDY_TOKENS = 4


def is_written_by_the_model(config: Any) -> bool:
    """Whether the data are text that the model writes itself, for which its weights are needed."""
    return isinstance(config.dataset, str) and config.dataset == "self"


def is_written(config: Any) -> bool:
    """Whether the data are text that a model writes: this one ("self"), or another one ("self:NAME")."""
    return is_written_by_the_model(config) or (isinstance(config.dataset, str) and config.dataset.startswith(PREFIX))


def load_data(
    config: Any,
    model: PreTrainedModel,
    tokenizer: Any = None,
    source: Source | None = None,
    held_out: int = 0,
) -> tuple[torch.Tensor | GivenInputs, str]:
    """The data to calibrate on: token ids, or the model's own keyword arguments where the data set is a list of those.

    Args and errors: see [`load_token_ids`].

    Raises:
        ValueError: also, the model's main input is not token ids, and the data are.
    """
    if are_calls(config.dataset):
        given = GivenInputs(config.dataset, config.num_samples + held_out)
        return given, f"inputs given by the caller: {given.sequences} sequences"
    wanted = getattr(model, "main_input_name", "input_ids")
    if wanted != "input_ids" and getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"the encoder of {type(model).__name__} reads {wanted}, so it cannot be calibrated on text or token ids: give "
            f"a list of the model's own arguments, dataset=[{{{wanted!r}: …, 'decoder_input_ids': …}}, …], or use "
            "dataset=None"
        )
    return load_token_ids(config, model, tokenizer, source, held_out)


def load_token_ids(
    config: Any,
    model: PreTrainedModel,
    tokenizer: Any = None,
    source: Source | None = None,
    held_out: int = 0,
    writer: Writer | None = None,
    shared: bool = False,
) -> tuple[torch.Tensor, str]:
    """Make the token ids to calibrate on.

    Documents (texts, chats or sequences of token ids) are joined end to end and cut into windows of exactly
    `config.sequence_length` tokens, without padding. `config.num_samples` windows are drawn with `config.seed`.

    Tokens that an attention mask hides are left out. So are tokens that look like padding, with a warning. Texts and chats
    are read in an order drawn with the seed, streams in their own order, and only as far as needed. Each text is tokenized
    with the tokenizer's defaults: if it adds a BOS token, each document starts with one. A chat becomes text by the
    tokenizer's chat template. A tensor or list whose rows have exactly that length is used row by row.

    Args:
        config: its options dataset, tokenizer, text_column, num_samples, sequence_length and seed are read.
        model: the causal model; its config gives the vocabulary and the number of positions. Its weights are needed for
            dataset="self" alone.
        tokenizer: for texts. Else `config.tokenizer` (an object, or where to load one), else the model's own.
        source: where the model was loaded from, and with which arguments: its tokenizer is read in the same way.
        held_out: further sequences, after the `num_samples` that are drawn without them.
        writer, shared: for dataset="self", see [`write_text`].

    Returns:
        (int64 [N, T] on the CPU, a description of the data for the log). N is less than num_samples, with a warning,
        if there is too little text; T is less than sequence_length, with a warning, if the model has fewer positions
        or there is not even one window.

    Raises:
        ValueError: nothing to tokenize, token ids outside the vocabulary, no tokenizer, no chat template, a data set that
            cannot be loaded, a missing column, a mask that does not fit.
        TypeError: `dataset` is, or contains, something else.
    """
    dataset, samples, seed = config.dataset, config.num_samples + held_out, config.seed
    length = fitting_length(config.sequence_length, model)
    write = partial(write_text, seed=seed, document_length=DOCUMENT_LENGTH, greedy_tokens=_GREEDY_TOKENS)
    if is_written_by_the_model(config):
        ids = write(model, samples, length, writer=writer, shared=shared)
        return ids, f"self: {samples} x {length} tokens written by the model itself, seed {seed}"

    given = tokenizer if tokenizer is not None else config.tokenizer
    source = source or Source(getattr(model, "name_or_path", "") or "")
    if is_written(config):
        name = dataset.removeprefix(PREFIX)
        ids = written_by_another(name, (samples, length), seed, held_out, given, source, DOCUMENT_LENGTH, write)
        _check_vocabulary(ids, model)
        return ids, f"{dataset}: {ids.shape[0]} x {ids.shape[1]} tokens written by {name}, seed {seed}"
    if isinstance(dataset, str):
        kind = dataset
        named = _named(config, samples, length, tokenizers.find_tokenizer(given, source))
        ids = pack(named, samples, length, seed, read_all=True, held_out=held_out)
    else:
        rows = read_rows(dataset, config.text_column, seed)
        kind = rows.kind
        documents = _documents(rows, given, source, model)
        ids = pack(documents, samples, length, seed, read_all=rows.in_memory, held_out=held_out)
    _check_vocabulary(ids, model)
    return ids, f"{kind}: {ids.shape[0]} x {ids.shape[1]} tokens, seed {seed}"


def _documents(rows: Rows, given: Any, source: Source, model: PreTrainedModel) -> Iterator[torch.Tensor]:
    """Token ids of the rows, without padding, for as long as the caller asks for more."""
    unpadding = Unpadding.of(model, given)
    tokenizer = None
    try:
        for batch in rows.batches:
            if batch and batch[0].ids is None and tokenizer is None:
                tokenizer = tokenizers.find_tokenizer(given, source)
            yield from unpadding.strip(batch if tokenizer is None else _tokenized(batch, tokenizer))
    finally:
        unpadding.report()


def _tokenized(batch: list[Row], tokenizer: Any) -> list[Row]:
    """The rows of texts or chats as rows of token ids; empty ones are left out."""
    options: dict[str, Any] = {}
    if batch[0].chat is not None:
        texts = [tokenizers.render(tokenizer, row.chat or (), row.tools, row.where) for row in batch]
        options = {"add_special_tokens": False}  # the template writes them
    else:
        texts = [row.text or "" for row in batch]
    texts = [text for text in texts if text.strip()]
    if not texts:
        return []
    rows = []
    for ids, mask in tokenizers.encode(tokenizer, texts, **options):
        rows.append(Row("a text", ids=ids, mask=torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()))
    return rows


def fitting_length(length: int, model: PreTrainedModel) -> int:
    """`length`, or the model's number of positions if that is less."""
    config = model.config.get_text_config(decoder=True)
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length"):
        positions = getattr(config, name, None)
        if isinstance(positions, int) and 0 < positions < length:
            logger.warning(
                "sequence_length=%d is more than the %d positions of %s: calibrating on sequences of %d tokens.",
                length, positions, type(model).__name__, positions,
            )  # fmt: skip
            return positions
    return length


def _named(config: Any, samples: int, length: int, tokenizer: Any) -> list[torch.Tensor]:
    """A data set by name, as Optimum's GPTQ quantizer loads it: windows of `length` tokens."""
    name = config.dataset
    try:
        from optimum.gptq.data import get_dataset

        with _global_generators_kept():
            found = get_dataset(name, tokenizer, nsamples=samples, seqlen=length, seed=config.seed)
    except Exception as error:  # a missing package, no network, an unknown name: from four libraries
        raise ValueError(
            f"dataset={name!r} could not be loaded ({type(error).__name__}: {tokenizers.first_line(error)}). Data sets by "
            f"name need the packages optimum and datasets, and the network. dataset must be {ALLOWED}."
        ) from error
    return [torch.as_tensor(sample["input_ids"]).reshape(-1) for sample in found]


@contextmanager
def _global_generators_kept() -> Iterator[None]:
    """Optimum seeds the global generators; the caller's must go on as if it had not."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _check_vocabulary(ids: torch.Tensor, model: PreTrainedModel) -> None:
    size = getattr(model.get_input_embeddings(), "num_embeddings", None)
    size = size or model.config.get_text_config(decoder=True).vocab_size
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= size:
        raise ValueError(
            f"dataset has token id {low if low < 0 else high}, outside the model's vocabulary of {size}: it was tokenized "
            "for another model, or the tokenizer is another model's."
        )
