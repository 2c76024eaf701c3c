"""Where greedy decoding of a quantized model leaves that of the model it was made of: a measure of long decoding.

Perplexity scores tokens that stand in a text. Here the text is the float model's own greedy continuation, and a prompt
scores the number of tokens before the other model would have written another one (ours).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..models.hf import cache_keyword, output_cache

__all__ = ["Divergence", "divergence", "greedy_tokens", "prompt_windows"]

# Logits of this many tokens exist at once: 1024 x 49152 float32 is 200 MB.
_CHUNK_TOKENS = 1024


@dataclass(frozen=True)
class Divergence:
    """How long two greedy decodings stay the same.

    Attributes:
        positions: for each prompt the number of new tokens before the first that differs; ``new_tokens`` where none
            does, so that mean and median are lower bounds then.
        agreement: share of all new tokens that the other model, given the float model's text up to there, would have
            written too. It counts what comes after the first difference as well and varies less with the prompts.
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

    @property
    def same(self) -> int:
        """Prompts whose continuations do not differ."""
        return sum(position == self.new_tokens for position in self.positions)


def prompt_windows(ids: Tensor, count: int, length: int) -> Tensor:
    """The beginnings of ``count`` equal parts of a text, int64 [count, length].

    Args:
        ids: int64 [tokens].
        count: prompts.
        length: tokens of a prompt.

    Raises:
        ValueError: count or length below 1, or fewer tokens than that.
    """
    if min(count, length) < 1 or ids.dim() != 1 or ids.numel() < count * length:
        raise ValueError(
            f"prompt_windows: ids must be 1-D with at least {count} x {length} tokens, both at least 1, got shape "
            f"{tuple(ids.shape)}; pass more text, or fewer or shorter prompts"
        )
    return ids[: ids.numel() // count * count].view(count, -1)[:, :length]


@torch.inference_mode()
def greedy_tokens(
    model: nn.Module, prompts: Tensor, new_tokens: int, progress: Callable[[int], None] | None = None
) -> Tensor:
    """The greedy continuation of each prompt, int64 [prompts, new_tokens]; an end of text does not stop it.

    Args:
        model: of transformers, or another whose forward takes ids, a key/value cache and ``use_cache=True``.
        prompts: int64 [prompts, tokens], without padding.
        new_tokens: at least 1.
        progress: called with the tokens done of each prompt.

    Raises:
        ValueError: prompts of another shape, or new_tokens below 1.
    """
    if prompts.dim() != 2 or 0 in prompts.shape or new_tokens < 1:
        raise ValueError(
            f"greedy_tokens: prompts must be [prompts, tokens], not empty, and new_tokens at least 1, got "
            f"{tuple(prompts.shape)} and {new_tokens}; pass prompts of one length"
        )
    step, cache = prompts, None
    keyword = cache_keyword(model)
    tokens = []
    for done in range(1, new_tokens + 1):
        out = model(step, **{keyword: cache}, use_cache=True)
        cache = output_cache(out)
        step = out.logits[:, -1:].argmax(-1)
        tokens.append(step)
        if progress is not None:
            progress(done)
    return torch.cat(tokens, 1)


@torch.inference_mode()
def divergence(model: Callable[[Tensor], object], prompts: Tensor, tokens: Tensor) -> Divergence:
    """Where a model's greedy decoding leaves ``tokens``, the greedy continuation by another one.

    It takes no decoding: up to the first difference both have the same text before them, so that one pass over prompt
    and tokens tells what this model would have written at each place.

    Args:
        model: called as ``model(ids)``; its ``.logits`` are [n, tokens, vocabulary] in any float dtype.
        prompts: int64 [prompts, tokens].
        tokens: int64 [prompts, new tokens], from :func:`greedy_tokens` of the float model.

    Raises:
        ValueError: prompts or tokens are empty, or not of as many rows.
    """
    if prompts.dim() != 2 or tokens.dim() != 2 or len(prompts) != len(tokens) or 0 in (*prompts.shape, *tokens.shape):
        raise ValueError(
            f"divergence: prompts and tokens must be [prompts, tokens], not empty, with as many rows, got "
            f"{tuple(prompts.shape)} and {tuple(tokens.shape)}; pass what greedy_tokens gave for these prompts"
        )
    new_tokens = tokens.shape[1]
    # The last token is not read: nothing is asked after it.
    text = torch.cat([prompts, tokens[:, :-1]], 1)
    same = []
    for ids, expected in zip(
        *(part.split(max(1, _CHUNK_TOKENS // text.shape[1])) for part in (text, tokens)), strict=True
    ):
        logits = model(ids).logits  # type: ignore[attr-defined]
        same.append(logits[:, -new_tokens:].argmax(-1) == expected)
    agree = torch.cat(same).to(torch.int64)
    positions = agree.cumprod(1).sum(1)
    return Divergence(tuple(positions.tolist()), agree.to(torch.float64).mean().item(), new_tokens)
