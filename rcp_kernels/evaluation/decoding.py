"""Greedy decoding without the fixed cost of ``generate()``, and its speed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ..models.hf import cache_argument

__all__ = ["Decoder", "decode_seconds", "generate"]


class Decoder:
    """Greedy decoding, one token a step, straight through ``model.forward`` with a growing key/value cache.

    ``generate()`` adds milliseconds of Python per token, the same for every configuration, which at 135 M parameters
    would hide most of what is to be compared.
    """

    def __init__(self, model: nn.Module, prompt: Tensor) -> None:
        """Run the prompt, int64 [1, tokens], through the model; `token` is then the first new token, [1, 1]."""
        from transformers import DynamicCache

        self.model = model
        self.cache = DynamicCache()
        self.position = 0
        self.token = prompt
        self.step()

    @torch.inference_mode()
    def step(self) -> Tensor:
        """Feed `token`, advance, and return the next token, int64 [1, 1]."""
        length = self.token.shape[1]
        positions = torch.arange(self.position, self.position + length).unsqueeze(0)
        output = self.model(
            input_ids=self.token,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **cache_argument(self.model, self.cache),
        )
        self.position += length
        self.token = output.logits[:, -1].argmax(-1, keepdim=True)
        return self.token


def generate(model: nn.Module, prompt: Tensor, new_tokens: int, stop_token: int | None = None) -> list[int]:
    """Greedy continuation of prompt, int64 [1, tokens], up to new_tokens long or to stop_token (not included)."""
    decoder = Decoder(model, prompt)
    tokens: list[int] = []
    while len(tokens) < new_tokens and decoder.token.item() != stop_token:
        tokens.append(int(decoder.token.item()))
        decoder.step()
    return tokens


def decode_seconds(
    models: Mapping[str, nn.Module], prompt: Tensor, new_tokens: int, burst: int = 8
) -> Iterator[tuple[int, dict[str, float]]]:
    """Time single decode steps of several models against each other.

    The models take turns of `burst` tokens, so that a slow moment of the machine hits all of them, and so that each
    still decodes consecutive tokens as it would in use.

    Yields:
        After each turn: tokens decoded so far per model, and the median seconds per token of each model.
    """
    decoders = {name: Decoder(model, prompt) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for done in range(0, new_tokens, burst):
        count = min(burst, new_tokens - done)
        for name, decoder in decoders.items():
            for _ in range(count):
                start = time.perf_counter()
                decoder.step()
                seconds[name].append(time.perf_counter() - start)
        yield done + count, {name: statistics.median(values) for name, values in seconds.items()}
