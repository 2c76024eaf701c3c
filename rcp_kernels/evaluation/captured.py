"""A greedy decode step that is the same work on the same memory for every token, and its CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..models.hf import cache_argument

__all__ = ["WARM_UP", "DecodeStep", "captured", "static_cache"]

WARM_UP = 3
"""Steps before a capture."""


class DecodeStep:
    """One greedy decode step that is the same work on the same memory for every token.

    The token and its position are tensors that the step itself replaces. The cache must have a static capacity and a
    length on the device: transformers' StaticCache, or QuantizedKVCache with ``static=True``.

    Attributes:
        token: the newest token, int64 [1, 1].
    """

    def __init__(self, model: nn.Module, prompt: Tensor, cache: Any) -> None:
        """Run a prompt, int64 [1, tokens] on the model's device, into an empty cache with room for it and all steps."""
        self._model = model
        self._cache = cache_argument(model, cache)
        # A tensor of inference mode may be written in inference mode alone, and the step runs in it.
        with torch.inference_mode():
            logits: Tensor = model(prompt, use_cache=True, logits_to_keep=1, **self._cache).logits
            self.token = logits[:, -1:].argmax(-1)
            self._position = torch.full((1, 1), prompt.shape[1], dtype=torch.int64, device=prompt.device)

    @torch.inference_mode()
    def __call__(self) -> None:
        """Replace the token by the next one."""
        output = self._model(self.token, position_ids=self._position, use_cache=True, logits_to_keep=1, **self._cache)
        self.token.copy_(output.logits[:, -1:].argmax(-1))
        self._position.add_(1)


def static_cache(model: nn.Module, capacity: int, packed: bool = False) -> Any:
    """An empty cache of a static capacity for :class:`DecodeStep`: in the model's dtype, or packed in 4 bits."""
    config: Any = model.config
    if packed:
        from ..nn.kv_cache import QuantizedKVCache

        return QuantizedKVCache(config, capacity=capacity, static=True)
    from transformers import StaticCache

    return StaticCache(config, max_cache_len=capacity)


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """A CUDA graph of a step, as a function. The step runs WARM_UP times before, to allocate what it keeps."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    replay: Callable[[], None] = graph.replay
    return replay
