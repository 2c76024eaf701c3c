"""The losses of RCP against their formulas."""

import math

import pytest
import torch

from rcp_kernels.evaluation.perplexity import perplexity_of
from rcp_kernels.methods.rcp.distillation import (
    LOSSES,
    Head,
    distillation_loss,
    mean_confidence,
    reverse_weight,
    student_perplexity,
)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_loss_and_gradient_are_the_formulas(loss, softcap):
    generator = torch.Generator().manual_seed(0)
    hidden, teacher = (torch.randn(300, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    weight = torch.randn(11, 8, generator=generator, dtype=torch.float64)
    m = reverse_weight(loss, 0.3)
    assert m == {"cakld": 0.3, "forward_kl": 0.0, "reverse_kl": 1.0, "symmetric_kl": 0.5}[loss]
    exact = hidden.clone().requires_grad_()

    def distribution(h):
        logits = h @ weight.T
        return (logits if softcap is None else softcap * torch.tanh(logits / softcap)).softmax(-1)

    s, t = distribution(exact), distribution(teacher)
    expected = (m * (s * (s / t).log()).sum(-1) + (1 - m) * (t * (t / s).log()).sum(-1)).mean()
    expected.backward()

    head = Head(weight.float(), softcap)
    got = hidden.float().requires_grad_()
    value = distillation_loss(got, teacher.float(), head, head, m)
    (3 * value).backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-4)
    torch.testing.assert_close(got.grad.double(), 3 * exact.grad, rtol=1e-3, atol=1e-6)


def test_loss_of_equal_distributions_is_zero():
    hidden = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    head = Head(torch.randn(7, 8, generator=torch.Generator().manual_seed(1)))
    assert distillation_loss(hidden, hidden, head, head, 0.4).item() == pytest.approx(0.0, abs=1e-6)


def test_unknown_loss_is_refused():
    with pytest.raises(ValueError, match=r"loss must be one of .* got 'kl'; check the spelling"):
        reverse_weight("kl", 0.5)


def test_confidence_is_the_mean_largest_probability():
    generator = torch.Generator().manual_seed(0)
    head = Head(torch.randn(7, 8, generator=generator))
    hidden = torch.randn(600, 8, generator=generator)
    value = mean_confidence(
        lambda ids: hidden[ids.flatten()], head, [torch.arange(400)[None], torch.arange(400, 600)[None]]
    )
    assert value == pytest.approx((hidden @ head.weight.T).softmax(-1).amax(-1).mean().item(), rel=1e-5)


def test_a_loss_beyond_the_exponential_is_an_infinite_perplexity():
    assert perplexity_of(2.0) == math.exp(2.0)
    assert perplexity_of(1000.0) == math.inf
    head = Head(torch.tensor([[2000.0], [0.0]]))
    assert student_perplexity(lambda ids: torch.ones(ids.numel(), 1), head, torch.ones(1, 4, dtype=torch.int64)) == (
        math.inf
    )
