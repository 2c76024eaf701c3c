"""Losses of next-token distributions, against a teacher and against text, without all logits in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ...evaluation.perplexity import perplexity_of
from ...ops.checks import check_one_of

__all__ = ["LOSSES", "Head", "distillation_loss", "mean_confidence", "student_perplexity"]

LOSSES = ("cakld", "forward_kl", "reverse_kl", "symmetric_kl")
"""The losses of :func:`reverse_weight`."""

# Tokens. 256 x 49152 float32 logits are 50 MB; four such arrays exist at once.
_CHUNK = 256


@dataclass(frozen=True)
class Head:
    """A frozen output head: logits are ``hidden @ weight.T``, softly capped in some families.

    Attributes:
        weight: floating point [vocabulary, hidden_size].
        softcap: logits become ``softcap * tanh(logits / softcap)``; None for no cap.
    """

    weight: Tensor
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """[tokens, hidden_size] -> float32 [tokens, vocabulary]. The product has the dtype of the weight."""
        values = (hidden.to(self.weight.dtype) @ self.weight.T).to(torch.float32)
        return values if self.softcap is None else torch.tanh(values / self.softcap) * self.softcap


def reverse_weight(loss: str, confidence: float) -> float:
    """The weight m of KL(student || teacher) in ``m KL(S||T) + (1 - m) KL(T||S)``.

    ``"cakld"`` has m = ``confidence``, the mean over tokens of the teacher's largest probability (BitDistiller's
    confidence-aware KL).
    """
    weights = {"cakld": confidence, "forward_kl": 0.0, "reverse_kl": 1.0, "symmetric_kl": 0.5}
    check_one_of("distillation", "loss", loss, LOSSES, "check the spelling")
    return weights[loss]


def distillation_loss(student: Tensor, teacher: Tensor, student_head: Head, teacher_head: Head, m: float) -> Tensor:
    """Mean over all tokens of ``m KL(S||T) + (1 - m) KL(T||S)`` of the next-token distributions.

    Value and gradient are computed together for 256 tokens at a time. Neither the logits (49152 float32 per token) nor
    their graph stays in memory. The heads get no gradient.

    Args:
        student: floating point [tokens, hidden_size], after the final norm.
        teacher: the same tokens' hidden states, in the dtype of the teacher's head.
        student_head, teacher_head: with the same vocabulary.
        m: 0 to 1.

    Returns:
        float32, 0-dim, differentiable in ``student``.
    """
    return _Distillation.apply(student, teacher, student_head, teacher_head, m)


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, head: Head, teacher_head: Head, m: float) -> Tensor:
        tokens = student.shape[0]
        gradient = torch.empty_like(student)
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        for start in range(0, tokens, _CHUNK):
            part = slice(start, start + _CHUNK)
            capped = head.logits(student[part])
            log_s = functional.log_softmax(capped, dim=-1)
            log_t = functional.log_softmax(teacher_head.logits(teacher[part]), dim=-1)
            s, t = log_s.exp(), log_t.exp()
            difference = log_s - log_t
            # With z the logits: d KL(S||T) / dz = S (log S/T - KL(S||T)), d KL(T||S) / dz = S - T.
            grad = torch.sub(s, t)
            total -= (1.0 - m) * (t * difference).sum(dtype=torch.float64)
            if m:
                reverse = (s * difference).sum(-1, keepdim=True)
                total += m * reverse.sum(dtype=torch.float64)
                grad.mul_(1.0 - m).add_(difference.sub_(reverse).mul_(s), alpha=m)
            if head.softcap is not None:
                grad.mul_(1.0 - (capped / head.softcap).square())
            gradient[part] = (grad.div_(tokens).to(head.weight.dtype) @ head.weight).to(student.dtype)
        ctx.save_for_backward(gradient)
        return (total / tokens).to(torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None, None, None


@torch.no_grad()
def mean_confidence(hidden_states: Callable[[Tensor], Tensor], head: Head, batches: list[Tensor]) -> float:
    """Mean over all tokens of the teacher's largest next-token probability: the m of CAKLD, which uses ten batches.

    ``hidden_states`` is the teacher: int64 [sequences, tokens] -> [sequences * tokens, hidden_size].
    """
    largest: list[Tensor] = []
    for batch in batches:
        for part in hidden_states(batch).split(_CHUNK):
            logits = head.logits(part)
            largest.append(torch.exp(logits.amax(-1) - logits.logsumexp(-1)))
    return float(torch.cat(largest).mean())


def student_perplexity(
    decoder: Callable[[Tensor], Tensor],
    head: Head,
    windows: Tensor,
    run: Callable[[Callable[[Any], Any], Iterable[Any]], list[Any]] = lambda f, items: list(map(f, items)),
) -> float:
    """exp of the mean negative log-likelihood of all tokens of the windows except each window's first.

    Args:
        decoder: int64 [1, tokens] -> hidden states [tokens, hidden_size] after the final norm.
        head: of the model.
        windows: int64 [windows, tokens].
        run: like ``map``; may use threads.
    """

    @torch.no_grad()
    def loss(window: Tensor) -> float:
        total = 0.0
        hidden = decoder(window.unsqueeze(0))[:-1]
        for part, target in zip(hidden.split(_CHUNK), window[1:].split(_CHUNK), strict=True):
            target = target.to(part.device)
            total += functional.cross_entropy(head.logits(part), target, reduction="sum").item()
        return total

    return perplexity_of(sum(run(loss, windows)) / (windows.shape[0] * (windows.shape[1] - 1)))
