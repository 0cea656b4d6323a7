"""How far a model's predictions are from another's: KL divergence and agreement on the likeliest token."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from tqdm.auto import tqdm

from ..calibration.arguments import without_cache
from ..calibration.device import evaluating
from .kept import KeptPredictions
from .perplexity import check_windows, input_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Divergence:
    """A model against a reference, over all positions of all windows.

    Attributes:
        mean: of KL(reference ‖ model) = Σ p log(p / q) over the vocabulary, in nats per token.
        median, percentile_99: of the same.
        top1_agreement: the share of positions where both find the same token likeliest.
        positions: their number.
    """

    mean: float
    median: float
    percentile_99: float
    top1_agreement: float
    positions: int


@torch.no_grad()
def divergence(
    model: PreTrainedModel | KeptPredictions,
    reference: PreTrainedModel | KeptPredictions,
    ids: torch.Tensor,
    batch_size: int = 4,
    bos: int | None = None,
) -> Divergence:
    """Compare the next-token distributions of two causal language models with one vocabulary.

    Every window is read from its own beginning, and every position that predicts a token of the window counts once, as
    in [`perplexity`]: N windows of L tokens give N (L - 1) positions.

    Args:
        model: q, such as the quantized model; or its kept predictions over these windows (with bos before each, if it is
            given), so that the model itself need not be in memory.
        reference: p, such as the dense model; or its kept predictions.
        ids: token ids [N, L], integer, N >= 1, L >= 2, without padding.
        batch_size: windows in one forward pass. Of the float32 copies of the logits, only one window's are held.
        bos: token id to put before every window.

    Raises:
        TypeError: ids is not an integer tensor.
        ValueError: ids is not [N >= 1, L >= 2], batch_size < 1, or the vocabularies differ in size.
    """
    check_windows(ids, batch_size)
    length = ids.shape[1]
    divergences, agreements = [], 0
    with ExitStack() as stack:
        for source in (model, reference):
            if not isinstance(source, KeptPredictions):
                stack.enter_context(evaluating(source))
        for begin in tqdm(range(0, len(ids), batch_size), desc="KL divergence", unit="batch", leave=False):
            batch = ids[begin : begin + batch_size].to(torch.long)
            inputs = batch if bos is None else torch.nn.functional.pad(batch, (1, 0), value=bos)
            pair = [_logits(source, inputs, begin)[:, -length:-1] for source in (model, reference)]
            if pair[0].shape[-1] != pair[1].shape[-1]:
                raise ValueError(
                    f"the models predict {pair[0].shape[-1]} and {pair[1].shape[-1]} tokens: only models with one "
                    "vocabulary can be compared"
                )
            for scores, expected in zip(*pair, strict=True):
                q = scores.float().log_softmax(-1)
                p = expected.to(scores.device).float().log_softmax(-1)
                # p log p is 0 where p is 0: a token that only the reference rules out costs nothing
                terms = torch.where(p == -torch.inf, 0.0, p.exp() * (p - q))
                divergences.append(terms.sum(-1).cpu())
                agreements += (q.argmax(-1) == p.argmax(-1)).sum().item()
            del pair  # before the next batch makes its own
    values = torch.cat(divergences).double()
    return Divergence(
        mean=values.mean().item(),
        median=values.median().item(),
        percentile_99=values.sort().values[round(0.99 * (len(values) - 1))].item(),
        top1_agreement=agreements / len(values),
        positions=len(values),
    )


def _logits(source: PreTrainedModel | KeptPredictions, inputs: torch.Tensor, begin: int) -> torch.Tensor:
    """The logits of these windows, of which `begin` is the number of the first."""
    if isinstance(source, KeptPredictions):
        return source.logits(begin, begin + len(inputs))
    return source(input_ids=inputs.to(input_device(source)), **without_cache(source)).logits
