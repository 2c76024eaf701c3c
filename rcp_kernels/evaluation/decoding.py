"""Greedy decoding through ``model.forward``, and its speed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..hardware import synchronize, to_device_of
from ..models.hf import cache_argument, output_cache

__all__ = ["Decoder", "decode_seconds", "greedy_tokens"]


class Decoder:
    """Greedy decoding of one or more prompts, one token a step, with the model's own key/value cache.

    ``generate()`` of transformers adds milliseconds of Python to each token. At 135 M parameters they would hide most
    of the difference between two models.

    Attributes:
        token: the newest token of each prompt, int64 [prompts, 1].
    """

    def __init__(self, model: nn.Module, prompts: Tensor) -> None:
        """Run the prompts, int64 [prompts, tokens] without padding and on any device, through the model."""
        self._model = model
        self._cache: Any = None
        self.token = to_device_of(model, prompts)
        self.step()

    @torch.inference_mode()
    def step(self) -> None:
        """Feed ``token`` to the model and replace it by the next one."""
        cache = cache_argument(self._model, self._cache)
        output = self._model(self.token, use_cache=True, logits_to_keep=1, **cache)
        self._cache = output_cache(output)
        self.token = output.logits[:, -1:].argmax(-1)


def greedy_tokens(
    model: nn.Module,
    prompts: Tensor,
    new_tokens: int,
    progress: Callable[[int], None] | None = None,
    *,
    stop_token: int | None = None,
) -> Tensor:
    """The greedy continuation of each prompt, int64 [prompts, new_tokens] on the device of the model.

    Args:
        model: a causal language model of transformers.
        prompts: int64 [prompts, tokens], without padding, on any device.
        new_tokens: at least 1.
        progress: called after each step with the tokens done of each prompt.
        stop_token: the result ends before the step in which every prompt yields this token. None: nothing ends it.

    Raises:
        ValueError: prompts are not 2-D or empty, or new_tokens is below 1.
    """
    if prompts.dim() != 2 or 0 in prompts.shape or new_tokens < 1:
        raise ValueError(
            f"greedy_tokens: prompts must be [prompts, tokens], not empty, and new_tokens at least 1, got "
            f"{tuple(prompts.shape)} and {new_tokens}; pass prompts of one length"
        )
    decoder = Decoder(model, prompts)
    tokens = [decoder.token[:, :0]]
    while stop_token is None or not bool((decoder.token == stop_token).all()):
        tokens.append(decoder.token)
        if progress is not None:
            progress(len(tokens) - 1)
        if len(tokens) > new_tokens:
            break
        decoder.step()
    return torch.cat(tokens, 1)


def decode_seconds(
    models: Mapping[str, nn.Module], prompt: Tensor, new_tokens: int, burst: int = 8
) -> Iterator[tuple[int, dict[str, float]]]:
    """Time single decode steps of several models against each other.

    The models take turns of ``burst`` consecutive tokens. A slow moment of the machine then hits all of them.

    Args:
        models: by name.
        prompt: int64 [1, tokens].
        new_tokens: steps timed for each model.
        burst: steps in a turn.

    Yields:
        After each turn: the tokens decoded so far by each model, and each model's median seconds a token.
    """
    decoders = {name: Decoder(model, prompt) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for done in range(0, new_tokens, burst):
        count = min(burst, new_tokens - done)
        for name, decoder in decoders.items():
            for _ in range(count):
                start = time.perf_counter()
                decoder.step()
                synchronize(decoder.token.device)
                seconds[name].append(time.perf_counter() - start)
        yield done + count, {name: statistics.median(values) for name, values in seconds.items()}
