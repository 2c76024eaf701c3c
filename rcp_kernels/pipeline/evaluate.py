"""``rcp-kernels eval`` and ``rcp-kernels generate``: how good a model is, and what it writes."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..data.by_name import held_out_text
from ..evaluation.divergence import divergence, greedy_tokens, prompt_windows
from ..evaluation.perplexity import perplexity
from ..methods.layers import check_vocabulary
from ..methods.student import FakeQuantKV
from ..models.hf import cache_keyword
from ..models.load import encode
from .load import load_any

__all__ = ["GreedyDivergence", "Measured", "check_sampling", "evaluate", "generate", "with_quantized_cache"]

_PROMPTS = 16
_PROMPT_TOKENS = 64


@dataclasses.dataclass(frozen=True)
class GreedyDivergence:
    """Where greedy decoding leaves that of another model, as numbers."""

    reference: str
    mean: float
    median: float
    agreement: float
    positions: tuple[int, ...]
    prompt_tokens: int
    new_tokens: int


@dataclasses.dataclass(frozen=True)
class Measured:
    """A perplexity and what it was measured on, and the divergence from another model if one was asked for."""

    model: str
    perplexity: float
    text: str
    tokens: int
    window: int
    kv_bits: int
    divergence: GreedyDivergence | None = None


def with_quantized_cache(model: nn.Module, kv_bits: int, kv_clip: float = 1.0) -> Callable[[Tensor], Any]:
    """The model as a function of token ids, with keys and values as a 4-bit cache gives them back; 16 for no cache."""
    if kv_bits == 16:
        return lambda ids: model(ids, use_cache=False)
    keyword = cache_keyword(model)
    return lambda ids: model(ids, **{keyword: FakeQuantKV(kv_bits, kv_clip)}, use_cache=False)


def _say(text: str) -> None:
    """A line on standard error: standard output holds the results only."""
    print(text, file=sys.stderr, flush=True)


def _reading_packed(
    model: nn.Module, kv_clip: float, prompt_tokens: int, log: Callable[[str], None]
) -> Callable[[Tensor], Any]:
    """The model as a function of token ids that reads its 4-bit cache as decoding does.

    What follows the prompt goes through the model in as many tokens at a time as the packed attention takes.
    """
    from ..nn.kv_cache import MOST_QUERIES, QuantizedKVCache

    _attend_packed(model, log)
    keyword = cache_keyword(model)

    def call(ids: Tensor) -> SimpleNamespace:
        cache = QuantizedKVCache(model.config, clip=kv_clip)
        pieces = (ids[:, :prompt_tokens], *ids[:, prompt_tokens:].split(MOST_QUERIES, dim=1))
        logits = [model(piece, **{keyword: cache}, use_cache=True).logits for piece in pieces if piece.shape[1]]
        return SimpleNamespace(logits=torch.cat(logits, dim=1))

    return call


def _attend_packed(model: nn.Module, log: Callable[[str], None]) -> None:
    """Let a model read its 4-bit cache packed, or say why it does not."""
    from ..nn.kv_cache import use_packed_attention

    reason = use_packed_attention(model)
    if reason is not None:
        config: Any = model.config
        log(f"{reason}; attention {config._attn_implementation!r} dequantizes the 4-bit cache instead")


def _check_positions(where: str, model: nn.Module, tokens: int, what: str, log: Callable[[str], None]) -> None:
    """Say that a sequence is longer than the model was made for."""
    config: Any = model.config
    positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if positions is not None and tokens > positions:
        log(
            f"{where}: warning: {what} should be at most {positions} tokens, the model's max_position_embeddings, got "
            f"{tokens}; ask for fewer: the model was not trained on positions beyond them"
        )


def evaluate(
    name: str | Path,
    text: str | Path | None = None,
    dataset: str | None = None,
    *,
    tokens: int = 4096,
    window: int = 512,
    divergence_from: str | Path | None = None,
    new_tokens: int = 128,
    progress: Callable[[int], None] | None = None,
    log: Callable[[str], None] = _say,
) -> Measured:
    """Perplexity of a model, quantized or float, with the cache that it is meant for; and its divergence from another.

    Perplexity is measured with keys and values as a 4-bit cache gives them back. Divergence reads the cache itself, by
    the attention that decoding uses.

    Args:
        name: a directory that quantize wrote, or what it takes as MODEL.
        text, dataset: see ``sources.held_out_text``.
        tokens: how much of the text to use at most.
        window: tokens of a window.
        divergence_from: a model, as `name`. Its greedy continuations of 16 parts of the text are compared with those
            of the model that is measured. None for no comparison.
        new_tokens: length of each of these continuations.
        progress: called with the tokens of the text done.
        log: called with a line if windows or continuations are longer than the model's ``max_position_embeddings``, or
            if its attention cannot read the cache packed; standard error without it.

    Raises:
        MissingExtra, ValueError, OSError: as loading and :func:`perplexity` raise them; or the other model has another
            vocabulary, or tokenizes the text otherwise.
    """
    if new_tokens < 1:
        raise ValueError(f"eval: new_tokens must be at least 1, got {new_tokens}; ask for one token")
    model, tokenizer, config = load_any(str(name))
    words, source = held_out_text(None if text is None else Path(text), dataset, tokens)
    ids = encode(tokenizer, words)[:tokens]
    check_vocabulary(model, ids, "eval")
    _check_positions("eval", model, window, "window", log)
    kv_bits, clip = (16, 1.0) if config is None else (config.kv_bits, config.kv_clip)
    called = with_quantized_cache(model, kv_bits, clip)
    value = perplexity(called, ids, window, progress)  # type: ignore[arg-type]
    measured = Measured(str(name), value, source, ids.numel() // window * window, window, kv_bits)
    if divergence_from is None:
        return measured
    prompts = prompt_windows(ids, _PROMPTS, min(_PROMPT_TOKENS, max(1, ids.numel() // _PROMPTS)))
    length = prompts.shape[1]
    _check_positions("eval", model, length + new_tokens, "prompt and new tokens", log)
    tokens_there = _continued(str(divergence_from), words, ids, prompts, new_tokens)
    if kv_bits != 16:
        called = _reading_packed(model, clip, length, log)
    found = divergence(called, prompts, tokens_there)
    diverged = GreedyDivergence(
        str(divergence_from), found.mean, found.median, found.agreement, found.positions, length, new_tokens
    )
    return dataclasses.replace(measured, divergence=diverged)


def _continued(name: str, words: str, ids: Tensor, prompts: Tensor, new_tokens: int) -> Tensor:
    """Another model's greedy continuations, after a look at whether it means the same by a token."""
    model, tokenizer, config = load_any(name)
    if config is not None and config.kv_bits != 16:
        raise ValueError(
            f"eval: the model to diverge from must keep keys and values in 16 bits, got {config.kv_bits} bits in "
            f"{name}; pass the float model"
        )
    if not torch.equal(encode(tokenizer, words)[: ids.numel()], ids):
        raise ValueError(
            f"eval: the model to diverge from must tokenize the text as the one that is measured, got other token ids "
            f"from {name}; pass the model that it was made of"
        )
    return greedy_tokens(model, prompts, new_tokens)


def check_sampling(temperature: float | None, top_p: float | None, seed: int | None) -> None:
    """Refuse options of sampling that cannot be; None is always an option.

    Raises:
        ValueError: an option outside its range, named.
    """
    if temperature is not None and not 0.0 < temperature < math.inf:
        raise ValueError(
            f"generate: temperature must be a finite number above 0, got {temperature}; leave it out to take the "
            f"likeliest token each time"
        )
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"generate: top_p must be in (0, 1], got {top_p}; 1 keeps all tokens")
    if seed is not None and not 0 <= seed < 2**64:
        raise ValueError(f"generate: seed must be 0 to 2**64 - 1, got {seed}; pass another")


def generate(
    name: str | Path,
    prompt: str,
    *,
    new_tokens: int = 64,
    chat: bool = True,
    temperature: float | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    log: Callable[[str], None] = _say,
) -> str:
    """The continuation of a prompt, with the cache that the model is meant for.

    The likeliest token is taken each time, unless one of temperature, top_p and seed is given: then tokens are drawn by
    chance.

    Args:
        name: as :func:`evaluate`.
        prompt: text.
        new_tokens: at most.
        chat: put the prompt into the model's chat template, if it has one.
        temperature: logits are divided by it before a token is drawn: above 0, and 1 without it.
        top_p: draw among the likeliest tokens that have this probability together: in (0, 1], and 1 without it.
        seed: the same seed draws the same tokens; another text each time without it.
        log: called with a line if the text may become longer than the model's ``max_position_embeddings``, or if its
            attention cannot read the cache packed; standard error without it.

    Raises:
        MissingExtra, ValueError, OSError: as loading raises them; an option out of range, or a prompt without a token.
    """
    check_sampling(temperature, top_p, seed)
    if new_tokens < 1:
        raise ValueError(f"generate: new_tokens must be at least 1, got {new_tokens}; ask for one token")
    model, tokenizer, config = load_any(str(name))
    if chat and tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        ids = ids["input_ids"]
    else:
        # With the special tokens that the model was trained to begin a text with, unlike `encode`.
        ids = tokenizer(prompt, return_tensors="pt").input_ids
    if not ids.numel():
        raise ValueError(f"generate: the prompt must have a token at least, got {prompt!r}; pass what to continue")
    _check_positions("generate", model, ids.shape[1] + new_tokens, "prompt and new tokens", log)
    options: dict[str, Any] = {
        "max_new_tokens": new_tokens,
        "do_sample": (temperature, top_p, seed) != (None, None, None),
        # None overrides what the model's generation_config has, and transformers' own top_k of 50.
        "temperature": None if temperature is None else float(temperature),
        "top_p": None if top_p is None else float(top_p),
        "top_k": None,
    }
    if config is not None and config.kv_bits != 16:
        from ..nn.kv_cache import QuantizedKVCache

        _attend_packed(model, log)
        options[cache_keyword(model)] = QuantizedKVCache(model.config, clip=config.kv_clip)
        # A generation_config may ask for another cache, or for none.
        options.update(cache_implementation=None, use_cache=True)
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.inference_mode():
        if seed is None:
            torch.seed()
        else:
            torch.manual_seed(seed)
        ids = ids.to(device)
        output = model.generate(ids, attention_mask=torch.ones_like(ids), **options)  # type: ignore[operator]
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
