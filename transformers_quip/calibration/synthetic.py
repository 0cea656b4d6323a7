"""Text that the model writes itself: calibration data that needs neither a tokenizer nor the network.

Sampling from the model's own distribution to calibrate its quantization is data-free in the sense of LLM-QAT
(arXiv 2305.17888, section 2.1), which also proposes random first tokens and a few greedy ones after them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from tqdm.auto import tqdm

from . import processes
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
    writer: Writer | None = None,
    shared: bool = False,
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
        writer: writes all documents instead of the model's forward: `block_writer.BlockWriter`, which reads the weights of
            one block at a time, and writes the same text.
        shared: whether all processes are here, and each writes some of the documents; all return the same text.

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
    hooked = any(hasattr(module, "_hf_hook") for module in model.modules())
    if hooked and any(parameter.device.type == "meta" for parameter in model.parameters()):
        logger.warning(
            "The model writes its own calibration text (dataset='self') while some of its weights are offloaded and must "
            "be loaded again for each of %d tokens: this is slow. Give texts or token ids as `dataset` instead.",
            length,
        )

    with evaluating(model), fast_cpu_linears(model):
        at_once = batch_size or _batch_size(model, first[:1], length)
        if shared:
            at_once = min(processes.gathered(at_once))
        rounds = -(-documents // at_once)
        at_once = -(-documents // rounds)  # even rounds: a short last one costs as much as a full one
        quiet = not progress or (shared and not processes.is_first())
        with tqdm(total=rounds * length, desc="Writing calibration text", unit="step", disable=quiet) as bar:
            parts = [Part(*part, generator) for part in zip(first.split(at_once), heat.split(at_once), strict=True)]
            if shared:
                for part in parts:
                    part.draw_all(length - 1 - greedy_tokens)
                parts = parts[processes.rank() :: processes.count()]
            if writer is not None:
                texts = writer(model, parts, length, greedy_tokens, bar)
            else:
                texts = [_write(model, part, length, greedy_tokens, bar) for part in parts]
    if shared:
        found = processes.gathered(texts)
        texts = [found[number % len(found)][number // len(found)] for number in range(sum(map(len, found)))]
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


class Part:
    """Documents that are written together.

    Args:
        first: the first token of each, int64 [B, 1].
        temperature: of each, float32 [B, 1].
        generator: all random numbers of earlier documents come before those of later ones.

    Attributes:
        tokens: int64 [B, 1] on the CPU, the last token of each.
    """

    def __init__(self, first: torch.Tensor, temperature: torch.Tensor, generator: torch.Generator):
        self.tokens, self._temperature, self._generator = first, temperature, generator
        self.written = [first]
        self._uniform: list[torch.Tensor] = []

    def draw_all(self, count: int) -> None:
        """Draw the random numbers of all `count` sampled tokens now, unless that was done."""
        # on the CPU: the same text on every device
        for _ in range(count - len(self._uniform)):
            self._uniform.append(torch.rand(len(self.tokens), 1, generator=self._generator))

    def extend(self, logits: torch.Tensor, greedy: bool) -> None:
        """Append one token to each document.

        Args:
            logits: [B, V] of the next token.
            greedy: whether to take the likeliest token instead of a sampled one.
        """
        logits = logits.float()
        if greedy:
            self.tokens = logits.argmax(-1, keepdim=True).cpu()
        else:
            if not self._uniform:
                self.draw_all(1)
            uniform = self._uniform.pop(0).to(logits.device)
            self.tokens = sample(logits / self._temperature.to(logits.device), uniform).cpu()
        self.written.append(self.tokens)

    @property
    def text(self) -> torch.Tensor:
        """All tokens, int64 [B, length]."""
        return torch.cat(self.written, 1)


Writer: TypeAlias = "Callable[[PreTrainedModel, Sequence[Part], int, int, tqdm], list[torch.Tensor]]"


def _write(model: PreTrainedModel, part: Part, length: int, greedy_tokens: int, bar: tqdm) -> torch.Tensor:
    """One document of `length` tokens after each token of a part: int64 [B, length] on the CPU."""
    device = execution_device(model.get_input_embeddings())
    cache = growing_cache(model.config, length)
    bar.update()
    for position in range(1, length):
        part.extend(_next_logits(model, part.tokens.to(device), cache)[:, -1], position <= greedy_tokens)
        bar.update()
    return part.text


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
