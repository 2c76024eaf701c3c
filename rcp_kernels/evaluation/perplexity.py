"""Perplexity of a causal language model on a fixed stretch of text."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..hardware import to_device_of

# Tokens whose float32 logits exist at once, beside the model's own output: 256 x 49152 float32 are 50 MB.
_CHUNK = 256


@torch.inference_mode()
def perplexity(
    model: nn.Module, token_ids: Tensor, window: int = 512, progress: Callable[[int], None] | None = None
) -> float:
    """The perplexity of a model: exp of the mean negative log-likelihood over non-overlapping windows.

    Args:
        model: called as ``model(ids)``; its ``.logits`` are [1, window, vocabulary] in any float dtype.
        token_ids: int64 [tokens], on any device. Each window is moved to the device of the model. Tokens after the last
            full window are not used.
        window: tokens of a forward pass. The first token of each window is context only. The mean is over
            ``(tokens // window) * (window - 1)`` predictions, in float64, from float32 logits.
        progress: called after each window with the number of tokens done.

    Raises:
        ValueError: window is below 2, or token_ids is not 1-D or shorter than one window.
    """
    if window < 2:
        raise ValueError(f"perplexity: window must be at least 2, got {window}; one token predicts the next")
    if token_ids.dim() != 1 or token_ids.numel() < window:
        raise ValueError(
            f"perplexity: token_ids must be 1-D with at least window = {window} tokens, got shape "
            f"{tuple(token_ids.shape)}; pass more text or a smaller window"
        )
    total = 0.0
    windows = token_ids[: token_ids.numel() // window * window].view(-1, 1, window)
    for i, ids in enumerate(windows):
        logits = model(to_device_of(model, ids)).logits[0, :-1]
        targets = ids[0, 1:].to(logits.device)
        for part, target in zip(logits.split(_CHUNK), targets.split(_CHUNK), strict=True):
            total += F.cross_entropy(part.float(), target, reduction="sum").item()
        if progress is not None:
            progress((i + 1) * window)
    return perplexity_of(total / (len(windows) * (window - 1)))


def perplexity_of(loss: float) -> float:
    """exp of a mean negative log-likelihood in nats; infinite above 709."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
