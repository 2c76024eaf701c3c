"""How long greedy decoding of a quantized model stays that of the float model.

Perplexity scores tokens of a given text. Here the text is the float model's own greedy continuation of a prompt. A
prompt's score is the number of tokens before the quantized model would have written another token. The measure is ours.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..hardware import to_device_of

__all__ = ["Divergence", "divergence", "prompt_windows"]

# Tokens whose logits exist at once: 1024 x 49152 float32 are 200 MB.
_CHUNK_TOKENS = 1024


@dataclass(frozen=True)
class Divergence:
    """How long two greedy decodings stay the same.

    Attributes:
        positions: for each prompt the number of new tokens before the first difference. It is ``new_tokens`` where
            there is no difference; mean and median are then lower bounds.
        agreement: the share of all new tokens that the quantized model also chooses, given the float model's text up to
            there. It includes tokens after the first difference and varies less from prompt to prompt.
        new_tokens: decoded for each prompt.
    """

    positions: tuple[int, ...]
    agreement: float
    new_tokens: int

    @property
    def mean(self) -> float:
        """Mean position."""
        return statistics.fmean(self.positions)

    @property
    def median(self) -> float:
        """Median position."""
        return statistics.median(self.positions)


def prompt_windows(ids: Tensor, count: int, length: int) -> Tensor:
    """Split a text into equal parts and return the beginning of each, int64 [count, length].

    Args:
        ids: int64 [tokens].
        count: prompts.
        length: tokens of a prompt.

    Raises:
        ValueError: count or length is below 1, or ids has fewer than count x length tokens.
    """
    if min(count, length) < 1 or ids.dim() != 1 or ids.numel() < count * length:
        raise ValueError(
            f"prompt_windows: ids must be 1-D with at least {count} x {length} tokens, both at least 1, got shape "
            f"{tuple(ids.shape)}; pass more text, or fewer or shorter prompts"
        )
    return ids[: ids.numel() // count * count].view(count, -1)[:, :length]


@torch.inference_mode()
def divergence(model: Callable[[Tensor], object], prompts: Tensor, tokens: Tensor) -> Divergence:
    """Where a model's greedy decoding leaves ``tokens``, the greedy continuation by another model.

    Up to the first difference both models read the same text. One pass over prompt and tokens therefore gives every
    choice of this model; nothing is decoded.

    Args:
        model: called as ``model(ids)``; its ``.logits`` are [n, tokens, vocabulary] in any float dtype.
        prompts: int64 [prompts, tokens], on any device.
        tokens: int64 [prompts, new tokens], on any device, from
            :func:`rcp_kernels.evaluation.decoding.greedy_tokens`. Prompts and tokens are moved to the model's device.

    Raises:
        ValueError: prompts or tokens are empty, or differ in their number of rows.
    """
    if prompts.dim() != 2 or tokens.dim() != 2 or len(prompts) != len(tokens) or 0 in (*prompts.shape, *tokens.shape):
        raise ValueError(
            f"divergence: prompts and tokens must be [prompts, tokens], not empty, with as many rows, got "
            f"{tuple(prompts.shape)} and {tuple(tokens.shape)}; pass what greedy_tokens gave for these prompts"
        )
    new_tokens = tokens.shape[1]
    text = torch.cat([prompts.to(tokens.device), tokens[:, :-1]], 1)  # nothing follows the last token
    rows = max(1, _CHUNK_TOKENS // text.shape[1])
    same = []
    for ids, expected in zip(text.split(rows), tokens.split(rows), strict=True):
        logits = model(to_device_of(model, ids)).logits  # type: ignore[attr-defined]
        same.append(logits[:, -new_tokens:].argmax(-1) == expected.to(logits.device))
    agree = torch.cat(same).to(torch.int64)
    positions = agree.cumprod(1).sum(1)
    return Divergence(tuple(positions.tolist()), agree.to(torch.float64).mean().item(), new_tokens)
