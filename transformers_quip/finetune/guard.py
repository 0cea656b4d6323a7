"""Never worse: a tuned model is compared with the model before tuning, on held-out windows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..calibration.device import evaluating
from ..evaluation.kept import last_hidden_states
from . import processes
from .head import Head, divergence_per_token
from .teacher import Teacher

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def window_divergences(
    model: PreTrainedModel, teacher: Teacher, student: Head, windows: Sequence[int], batch_size: int = 4
) -> torch.Tensor:
    """The mean of KL(teacher ‖ model) over the tokens of each of these windows.

    Args:
        model: as it is, quantized or a student.
        teacher: the dense model's states.
        student: makes the model's logits.
        windows: numbers of the teacher's windows. If several processes tune together, each reads a part of them.

    Returns:
        float64 [len(windows)], in nats per token.
    """
    found, own = [], processes.mine(windows)
    head = teacher.head()
    with evaluating(model):
        for begin in range(0, len(own), batch_size):
            chosen = own[begin : begin + batch_size]
            hidden = last_hidden_states(model, teacher.ids[chosen].to(model.device)).flatten(0, 1)
            states = teacher.states[chosen].flatten(0, 1).to(hidden)
            each = divergence_per_token(hidden, states, student, head)
            found.append(each.double().view(len(chosen), -1).mean(1))
    return processes.joined(torch.cat(found), len(windows)).cpu()


@dataclass(frozen=True)
class Verdict:
    """Whether a tuned model is better than the model before, on the same windows.

    Attributes:
        before, after: mean KL divergence to the teacher, in nats per token.
        error: standard error of the mean of the differences, window by window.
        accepted: whether the mean difference is a gain by more than its standard error.
    """

    before: float
    after: float
    error: float
    accepted: bool

    @classmethod
    def of(cls, before: torch.Tensor, after: torch.Tensor) -> Verdict:
        """Compare two results of [`window_divergences`]. A result that is not finite is never accepted."""
        difference = after - before
        error = (difference.std() / math.sqrt(len(difference))).item() if len(difference) > 1 else 0.0
        gain = -difference.mean().item()
        return cls(before.mean().item(), after.mean().item(), error, math.isfinite(gain) and gain > error)

    def __str__(self) -> str:
        return (
            f"KL divergence to the dense model on held-out windows: {self.before:.4f} before, {self.after:.4f} after "
            f"(the difference is known to ±{self.error:.4f})"
        )


@contextmanager
def restored_unless_kept(model: PreTrainedModel, also: Mapping[str, nn.Parameter] | None = None) -> Iterator[Kept]:
    """Restores every small floating-point parameter of the model, unless `keep()` of the yielded object was called.

    Args:
        model: the model.
        also: further parameters to restore, by name.
    """
    small = {n: p for n, p in model.named_parameters() if p.is_floating_point() and p.ndim == 1 and p.device.type != "meta"}
    small |= also or {}
    before = {name: parameter.detach().clone() for name, parameter in small.items()}
    kept = Kept()
    try:
        yield kept
    finally:
        if not kept.is_kept:
            with torch.no_grad():
                for name, parameter in small.items():
                    parameter.data = before[name]


class Kept:
    """Decides whether a result is kept."""

    def __init__(self) -> None:
        self.is_kept = False

    def keep(self) -> None:
        """Keep it."""
        self.is_kept = True
