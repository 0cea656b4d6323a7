"""From a model's last hidden states to its logits, and the KL divergence between two models without a graph of logits.

The logits of a token are as many numbers as the vocabulary has tokens, its last hidden state about a hundredth of that. So
a teacher keeps hidden states, and logits are computed from them again, a few tokens at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..evaluation.kept import LogitMap

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Tokens whose logits exist at one time.
CHUNK = 128


def hidden_states(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """The input of the head, [B, T, n], for token ids [B, T], with a graph for derivatives."""
    return model.base_model(input_ids=ids, use_cache=False).last_hidden_state


@dataclass(frozen=True)
class Head:
    """The function from last hidden states to logits.

    Attributes:
        project: hidden states [T, n] → [T, vocabulary]; differentiable.
        logits: the step after it.
    """

    project: Callable[[torch.Tensor], torch.Tensor]
    logits: LogitMap

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """The logits of hidden states [T, n], float32."""
        return self.logits(self.project(hidden).float())


def divergence_sum(
    hidden: torch.Tensor, states: torch.Tensor, student: Head, teacher: Head, reverse: float = 0.0
) -> torch.Tensor:
    """Σ over tokens of (1 − r) KL(teacher ‖ student) + r KL(student ‖ teacher), which has gradients.

    They are those of `hidden` and of the parameters of `student.project`.

    Args:
        hidden: the student's last hidden states [T, n].
        states: the teacher's [T, n'].
        reverse: the share r. Tokens that the teacher rules out do not count in its part.

    Returns:
        A float32 scalar.
    """
    return _Divergence.apply(hidden, states, student, teacher, reverse, *_trained(student))


@torch.no_grad()
def divergence_per_token(hidden: torch.Tensor, states: torch.Tensor, student: Head, teacher: Head) -> torch.Tensor:
    """KL(teacher ‖ student) of each token, float32 [T]."""
    pairs = zip(hidden.split(CHUNK), states.split(CHUNK), strict=True)
    return torch.cat([_divergence(student(h), teacher(s)) for h, s in pairs])


def _divergence(q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """KL(softmax p ‖ softmax q) along the last dimension."""
    q, p = q.log_softmax(-1), p.log_softmax(-1)
    # p log p is 0 where p is 0: a token that only the teacher rules out costs nothing
    return torch.where(p == -torch.inf, 0.0, p.exp() * (p - q)).sum(-1)


def _divergence_gradient(q: torch.Tensor, p: torch.Tensor, reverse: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of [`divergence_sum`] for logits q and p, and its gradient with respect to q.

    The gradient of KL(p ‖ q) is softmax q - softmax p, that of KL(q ‖ p) is q ⊙ (log q - log p - KL(q ‖ p)) for chances q
    and p. Autograd would read and write the logits three times as often, and they are the larger part of a small model's
    step.
    """
    q, p = q.log_softmax(-1), p.log_softmax(-1)
    chances = p.exp()
    ratios = torch.sub(q, p, out=p).masked_fill_(chances == 0, 0.0)
    own = q.exp_()
    total = -(1 - reverse) * torch.linalg.vecdot(chances, ratios).sum()
    if reverse:
        back = torch.linalg.vecdot(own, ratios)
        total = total + reverse * back.sum()
        factors = ratios.sub_(back[:, None]).mul_(reverse).add_(1 - reverse)
        return total, own.mul_(factors).sub_(chances, alpha=1 - reverse)
    return total, own.sub_(chances)


def _trained(head: Head) -> list[nn.Parameter]:
    module = head.project
    if not isinstance(module, nn.Module):
        return []
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


class _Divergence(torch.autograd.Function):
    """Each chunk's gradient is computed while its logits exist, so that only one chunk's logits exist at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        states: torch.Tensor,
        student: Head,
        teacher: Head,
        reverse: float,
        *trained: torch.Tensor,
    ) -> torch.Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(hidden)
        others = [torch.zeros_like(parameter) for parameter in trained]
        for begin in range(0, len(hidden), CHUNK):
            part = slice(begin, begin + CHUNK)
            with torch.enable_grad():
                h = hidden[part].detach().requires_grad_()
                logits = student(h)
            loss, slope = _divergence_gradient(logits.detach(), teacher(states[part]), reverse)
            found = torch.autograd.grad(logits, [h, *trained], slope)
            gradient[part] = found[0]
            for whole, more in zip(others, found[1:], strict=True):
                whole += more
            total += loss
        ctx.save_for_backward(gradient, *others)
        return total

    @staticmethod
    def backward(ctx: Any, factor: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradient, *others = ctx.saved_tensors
        return (gradient * factor, None, None, None, None, *(other * factor for other in others))
