"""Decoding through ``model.forward``, greedy or sampled, and its speed.

``generate()`` of transformers adds milliseconds of Python to each token. At 135 M parameters they would be a large part
of a token. The loop here runs the prompt, and then steps of one token that are the same call each time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..hardware import synchronize, to_device_of
from ..models.hf import cache_argument, cache_capacity, cache_keyword, output_cache, position_argument

__all__ = ["Decoder", "decode_loop", "decode_seconds", "greedy_tokens"]

# Steps before a capture: libraries allocate and Triton compiles in the first one, which a capture forbids.
_WARM_UP_STEPS = 2


class Decoder:
    """Decoding of one or more prompts, one token a step.

    On CUDA, the steps on a cache of fixed capacity (:class:`rcp_kernels.nn.QuantizedKVCache` with ``static=True``,
    transformers' StaticCache) are captured in a CUDA graph. Without a compiled ``forward`` the first step captures it.

    Attributes:
        logits: for the next token of each prompt, [prompts, vocabulary]. A later step may overwrite this tensor.
    """

    @torch.inference_mode()
    def __init__(
        self, model: nn.Module, prompts: Tensor, *, cache: Any = None, forward: Callable[..., Any] | None = None
    ) -> None:
        """Run the prompts through the model.

        Args:
            model: a causal language model of transformers.
            prompts: int64 [prompts, tokens], without padding, on any device.
            cache: empty, of transformers or of this package. None: the cache that the model makes.
            forward: what computes a step, for example the compiled model. None: the model.
        """
        prompts = to_device_of(model, prompts)
        output = model(input_ids=prompts, use_cache=True, logits_to_keep=1, **cache_argument(model, cache))
        self.logits: Tensor = output.logits[:, -1]
        self._cache = output_cache(output)
        self._capacity = cache_capacity(self._cache)
        self._forward = model if forward is None else forward
        self._held = prompts.shape[1]
        self._tokens = prompts[:, -1:].clone()
        self._arguments = {"use_cache": True, "logits_to_keep": 1, **cache_argument(model, self._cache)}
        self._position = torch.full((1, 1), self._held, device=prompts.device)
        self._arguments |= position_argument(model, self._position)
        self._captures = prompts.is_cuda and forward is None and _can_capture(model, self._cache)
        self._graph: torch.cuda.CUDAGraph | None = None

    @property
    def token(self) -> Tensor:
        """The likeliest next token of each prompt, int64 [prompts, 1]."""
        return self.logits.argmax(-1, keepdim=True)

    @property
    def captured(self) -> bool:
        """Whether the last step was a replay of a CUDA graph."""
        return self._graph is not None

    @torch.inference_mode()
    def step(self, tokens: Tensor | None = None) -> None:
        """Feed a token of each prompt to the model, and replace ``logits``.

        Args:
            tokens: int64 [prompts, 1]. None: ``token``.

        Raises:
            ValueError: the cache is full.
        """
        if self._capacity is not None and self._held >= self._capacity:
            raise ValueError(
                f"Decoder: the cache must have room for the next token, got a full cache with a capacity of "
                f"{self._capacity} positions; make it with a larger capacity"
            )
        tokens = self.token if tokens is None else tokens
        if self._captures:
            self._tokens.copy_(tokens)
            if self._graph is None:
                self._graph = self._capture()
            self._graph.replay()
        else:
            self.logits = self._run(tokens)
        self._held += 1

    def wait(self) -> None:
        """Return when the device has computed ``logits``."""
        synchronize(self.logits.device)

    def _run(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self._forward(input_ids=tokens, **self._arguments).logits[:, -1]
        self._position.add_(1)
        return logits

    def _capture(self) -> torch.cuda.CUDAGraph:
        """A graph of the step that reads ``_tokens`` and writes ``logits``. Positions stay as they are."""
        side = torch.cuda.Stream(self._tokens.device)
        side.wait_stream(torch.cuda.current_stream(self._tokens.device))
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP_STEPS):
                self._run(self._tokens)
                self._cache.crop(-1)
                self._position.sub_(1)
        torch.cuda.current_stream(self._tokens.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.logits = self._run(self._tokens)
        return graph


def _can_capture(model: nn.Module, cache: Any) -> bool:
    """Whether a step is the same launches at every position, and the cache can take the steps of the warm-up back."""
    for layer in cache.layers:
        if not (getattr(layer, "is_compileable", False) and getattr(layer, "is_croppable", False)):
            return False
    # The tables of these rotary embeddings depend on the position, which transformers reads on the host.
    kinds = " ".join(str(getattr(module, "rope_type", "")) for module in model.modules())
    return "dynamic" not in kinds and "longrope" not in kinds


def decode_loop(
    model: nn.Module,
    input_ids: Tensor,
    logits_processor: Callable[[Tensor, Tensor], Tensor],
    stopping_criteria: Callable[[Tensor, Any], Tensor],
    generation_config: Any,
    **model_kwargs: Any,
) -> Tensor:
    """The loop of ``generate`` for greedy search and sampling: ``model.generate(ids, custom_generate=decode_loop)``.

    transformers prepares the logits processors, the stopping criteria and the cache, and the tokens are those of its
    own loop. The same seed draws the same tokens. A streamer gets only the prompt: transformers passes none to a loop.

    Args:
        model: a causal language model of transformers.
        input_ids: int64 [prompts, tokens].
        logits_processor: of transformers; called with the tokens so far and float32 logits.
        stopping_criteria: of transformers.
        generation_config: of transformers.
        model_kwargs: of transformers. A cache in them is used.

    Returns:
        int64 [prompts, tokens + new tokens]: the prompts and their continuations. A prompt that ended is padded.

    Raises:
        ValueError: another way to decode, a padded prompt, or an argument that this loop does not pass on.
    """
    cache = _checked_cache(model, generation_config, model_kwargs)
    ends = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)  # type: ignore[attr-defined]
    decoder = Decoder(model, input_ids, cache=cache)
    unfinished = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
    while True:
        scores = logits_processor(input_ids, decoder.logits.to(torch.float32, copy=True))
        if generation_config.do_sample:
            tokens = torch.multinomial(torch.softmax(scores, -1), 1)
        else:
            tokens = scores.argmax(-1, keepdim=True)
        if ends:
            pad = generation_config._pad_token_tensor
            tokens = torch.where(unfinished[:, None], tokens, pad)
        input_ids = torch.cat([input_ids, tokens], 1)
        unfinished = unfinished & ~stopping_criteria(input_ids, None)
        if not bool(unfinished.any()):
            return input_ids
        decoder.step(tokens)


def _checked_cache(model: nn.Module, generation_config: Any, model_kwargs: dict[str, Any]) -> Any:
    """The cache in the arguments of a loop. The loop needs none of the others, and refuses those that change tokens."""
    mode = str(generation_config.get_generation_mode().value)
    if mode not in ("greedy_search", "sample"):
        raise ValueError(
            f"decode_loop: the generation mode must be greedy_search or sample, got {mode}; leave out custom_generate"
        )
    cache = model_kwargs.pop(cache_keyword(model), None)
    mask = model_kwargs.pop("attention_mask", None)
    unknown = model_kwargs.keys() - {"use_cache", "logits_to_keep", "position_ids", "cache_position"}
    if unknown:
        raise ValueError(
            f"decode_loop: generate must get no further arguments of the model, got {sorted(unknown)}; leave them or "
            f"custom_generate out"
        )
    if mask is not None and not bool(mask.all()):
        # Each step would need a mask and positions of its own for each prompt.
        raise ValueError(
            f"decode_loop: prompts must have no padding, got {int((mask == 0).sum())} padded tokens; decode prompts of "
            f"one length together"
        )
    return cache


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
    token = decoder.token
    tokens = [token[:, :0]]
    while stop_token is None or not bool((token == stop_token).all()):
        tokens.append(token)
        if progress is not None:
            progress(len(tokens) - 1)
        if len(tokens) > new_tokens:
            break
        decoder.step(token)
        token = decoder.token
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
                decoder.wait()
                seconds[name].append(time.perf_counter() - start)
        yield done + count, {name: statistics.median(values) for name, values in seconds.items()}
