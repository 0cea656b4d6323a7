"""Text that the model writes itself: calibration data that needs neither a tokenizer nor the network.

Sampling from the model's own distribution to calibrate its quantization is data-free in the sense of LLM-QAT
(arXiv 2305.17888, section 2.1), which also proposes random first tokens and a few greedy ones after them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from .arguments import cache_argument
from .device import evaluating, execution_device
from .growing_cache import cache_bytes, growing_cache
from .precision import fast_cpu_linears

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

STARTS = ("random", "bos")

# More documents at once than this do not make matrix products faster.
_MOST_AT_ONCE = 256
_MEMORY = 1 << 30


@torch.no_grad()
def write_text(
    model: PreTrainedModel,
    num_samples: int,
    sequence_length: int,
    seed: int = 0,
    temperature: float | Sequence[float] = 1.0,
    start: str = "random",
    document_length: int | None = None,
    greedy_tokens: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> torch.Tensor:
    """Let the model write token sequences by sampling from its own next-token distribution.

    There is no padding and no early stop: after an end-of-text token the model continues writing, as in text packed for
    training. The model's weights, training mode and generation config are left as they are. Float32 matrix products use
    bfloat16 factors where the CPU has instructions for them: text does not need more.

    Args:
        model: a causal language model, on any devices (accelerate's hooks work, but weights offloaded to CPU or disk
            are loaded again for each token).
        num_samples: sequences to write, N.
        sequence_length: tokens in each, T.
        seed: random seed; the global generators are not touched.
        temperature: divides the logits before sampling; above 0. A sequence of values is dealt out to the documents in
            turn.
        start: the first token of each document: "random", drawn uniformly from the vocabulary, or "bos", the config's
            beginning-of-text token (else its end-of-text token).
        document_length: sequences are packed from documents of this many tokens, which is quicker and more varied than
            one document a sequence (None).
        greedy_tokens: this many tokens after the first are the likeliest ones instead of sampled ones.
        batch_size: documents written at once; None: as many as fit into 1 GiB (half of the free memory on a GPU), at
            most 256.
        progress: show a tqdm bar.

    Returns:
        Token ids, int64 [N, T], on the CPU.

    Raises:
        ValueError: an argument out of range, a model that has no language modelling head or no start token, or logits
            that are NaN or Inf.
    """
    length = sequence_length if document_length is None else min(document_length, sequence_length)
    temperatures = [temperature] if isinstance(temperature, (int, float)) else list(temperature)
    _check(model, num_samples, length, temperatures, start, greedy_tokens, batch_size)
    generator = torch.Generator().manual_seed(seed)
    documents = -(-num_samples * sequence_length // length)
    first = _first_tokens(model, documents, start, generator)
    heat = torch.tensor(temperatures, dtype=torch.float32).repeat(-(-documents // len(temperatures)))[:documents, None]
    offloaded = any(parameter.device.type == "meta" for parameter in model.parameters())
    if offloaded:
        logger.warning(
            "The model writes its own calibration text (dataset='self') while some of its weights are offloaded and must "
            "be loaded again for each of %d tokens: this is slow. Give texts or token ids as `dataset` instead.",
            length,
        )

    texts = []
    with evaluating(model), fast_cpu_linears(model):
        at_once = batch_size or _batch_size(model, first[:1], length)
        rounds = -(-documents // at_once)
        at_once = -(-documents // rounds)  # even rounds: a short last one costs as much as a full one
        with tqdm(total=rounds * length, desc="Writing calibration text", unit="step", disable=not progress) as bar:
            for part, part_heat in zip(first.split(at_once), heat.split(at_once), strict=True):
                texts.append(_write(model, part, length, part_heat, greedy_tokens, generator, bar))
    return torch.cat(texts).flatten()[: num_samples * sequence_length].view(num_samples, sequence_length)


def _check(model, num_samples, length, temperatures, start, greedy_tokens, batch_size) -> None:
    if model.get_output_embeddings() is None or cache_argument(model) is None:
        raise ValueError(
            f"{type(model).__name__} cannot write its own calibration text (dataset='self'): it is not a causal language "
            "model with a key/value cache and a language modelling head. Give texts or token ids as `dataset`, or None."
        )
    for name, value, least in (
        ("num_samples", num_samples, 1),
        ("sequence_length and document_length", length, 1),
        ("greedy_tokens", greedy_tokens, 0),
        ("batch_size", 1 if batch_size is None else batch_size, 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}.")
    if not temperatures or not all(0 < value < float("inf") for value in temperatures):
        raise ValueError(f"temperature must be finite and above 0, got {temperatures}.")
    if start not in STARTS:
        raise ValueError(f"start must be one of {', '.join(map(repr, STARTS))}, got {start!r}.")


def _next_logits(model: PreTrainedModel, tokens: torch.Tensor, cache: Any) -> torch.Tensor:
    """Logits [B, T, V] of tokens [B, T] that follow those in the cache; the cache is extended."""
    name = cache_argument(model)
    if name is None:
        raise ValueError(f"{type(model).__name__} takes no key/value cache")
    return model(input_ids=tokens, use_cache=True, **{name: cache}).logits


def _first_tokens(model: PreTrainedModel, documents: int, start: str, generator: torch.Generator) -> torch.Tensor:
    """The first token of each document, int64 [documents, 1]."""
    config = model.config.get_text_config(decoder=True)
    if start == "random":
        return torch.randint(config.vocab_size, (documents, 1), generator=generator)
    token = config.bos_token_id if config.bos_token_id is not None else config.eos_token_id
    token = token[0] if isinstance(token, (list, tuple)) else token
    if token is None:
        raise ValueError("start='bos' needs a bos_token_id or eos_token_id in the model's config: use start='random'.")
    return torch.full((documents, 1), token)


def _batch_size(model: PreTrainedModel, token: torch.Tensor, length: int) -> int:
    """How many documents fit into the memory meant for them, measured on one token of one document."""
    device = execution_device(model.get_input_embeddings())
    cache = growing_cache(model.config, 1)
    logits = _next_logits(model, token.to(device), cache)
    per_document = cache_bytes(cache, length) + 3 * 4 * logits.shape[-1]  # logits, probabilities, their sums
    memory = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else _MEMORY
    return max(1, min(_MOST_AT_ONCE, memory // per_document))


def _write(
    model: PreTrainedModel,
    first: torch.Tensor,
    length: int,
    temperature: torch.Tensor,
    greedy_tokens: int,
    generator: torch.Generator,
    bar: tqdm,
) -> torch.Tensor:
    """One document of `length` tokens after each token of `first` [B, 1]: int64 [B, length] on the CPU."""
    device = execution_device(model.get_input_embeddings())
    text = torch.empty(len(first), length, dtype=torch.long, device=device)
    text[:, :1] = token = first.to(device)
    cache = growing_cache(model.config, length)
    bar.update()
    for position in range(1, length):
        logits = _next_logits(model, token, cache)[:, -1].float()
        if position <= greedy_tokens:
            token = logits.argmax(-1, keepdim=True).to(device)
        else:
            uniform = torch.rand(len(first), 1, generator=generator)  # on the CPU: the same text on every device
            token = sample(logits / temperature.to(logits.device), uniform.to(logits.device)).to(device)
        text[:, position : position + 1] = token
        bar.update()
    return text.cpu()


def sample(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Draw from softmax(logits) by inverting its cumulative distribution.

    One random number a row, where torch.multinomial draws one for each entry: 14 times quicker for 49152 entries.

    Args:
        logits: float32 [B, V].
        uniform: [B, 1] in [0, 1).

    Returns:
        int64 [B, 1]. An entry of probability 0 is never drawn.

    Raises:
        ValueError: logits that are NaN or +Inf.
    """
    cumulative = logits.softmax(-1).cumsum_(-1)
    total = cumulative[:, -1:]
    if not total.isfinite().all():
        raise ValueError(
            "The model's logits are NaN or Inf while it writes its own calibration text (dataset='self'): it overflows in "
            "its dtype, or its weights do. Load it with dtype=torch.float32 or torch.bfloat16."
        )
    below = torch.nextafter(total, torch.zeros_like(total))  # uniform * total may round up to total itself
    return torch.searchsorted(cumulative, torch.minimum(uniform * total, below), right=True)
