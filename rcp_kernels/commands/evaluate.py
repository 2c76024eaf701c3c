"""``rcp-kernels eval`` and ``rcp-kernels generate``: what a quantized, or float, model does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..divergence import divergence, greedy_tokens, prompt_windows
from ..methods.calibration import check_vocabulary
from ..methods.student import FakeQuantKV
from ..perplexity import perplexity
from .sources import encode, held_out_text, load_any

__all__ = ["GreedyDivergence", "Measured", "evaluate", "generate", "with_quantized_cache"]

_PROMPTS = 16
_PROMPT_TOKENS = 64


@dataclasses.dataclass(frozen=True)
class GreedyDivergence:
    """Where greedy decoding leaves that of another model: :class:`rcp_kernels.divergence.Divergence`, as numbers."""

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
    return lambda ids: model(ids, past_key_values=FakeQuantKV(kv_bits, kv_clip), use_cache=False)


def evaluate(
    name: str,
    text: Path | None = None,
    dataset: str | None = None,
    *,
    tokens: int = 4096,
    window: int = 512,
    divergence_from: str | None = None,
    new_tokens: int = 128,
    progress: Callable[[int], None] | None = None,
) -> Measured:
    """Perplexity of a model, quantized or float, with the cache that it is meant for; and its divergence from another.

    Args:
        name: a directory that quantize wrote, or what it takes as MODEL.
        text, dataset: see ``sources.held_out_text``.
        tokens: of the text, at most.
        window: tokens of a window.
        divergence_from: a model, as `name`, whose greedy continuations of 16 parts of the text this one's are held
            against; None for none.
        new_tokens: of each of these continuations.
        progress: called with the tokens of the text done.

    Raises:
        MissingExtra, ValueError, OSError: as loading and :func:`perplexity` raise them; or the other model has another
            vocabulary, or tokenizes the text otherwise.
    """
    model, tokenizer, config = load_any(name)
    words, source = held_out_text(text, dataset, tokens)
    ids = encode(tokenizer, words)[:tokens]
    check_vocabulary(model, ids, "eval")
    kv_bits, clip = (16, 1.0) if config is None else (config.kv_bits, config.kv_clip)
    called = with_quantized_cache(model, kv_bits, clip)
    value = perplexity(called, ids, window, progress)  # type: ignore[arg-type]
    measured = Measured(name, value, source, ids.numel() // window * window, window, kv_bits)
    if divergence_from is None:
        return measured
    prompts = prompt_windows(ids, _PROMPTS, min(_PROMPT_TOKENS, max(1, ids.numel() // _PROMPTS)))
    tokens_there = _continued(divergence_from, words, ids, prompts, new_tokens)
    found = divergence(called, prompts, tokens_there)
    diverged = GreedyDivergence(
        divergence_from, found.mean, found.median, found.agreement, found.positions, prompts.shape[1], new_tokens
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


def generate(name: str, prompt: str, *, new_tokens: int = 64, chat: bool = True) -> str:
    """The greedy continuation of a prompt, with the cache that the model is meant for.

    Args:
        name: as :func:`evaluate`.
        prompt: text.
        new_tokens: at most.
        chat: put the prompt into the model's chat template, if it has one.
    """
    model, tokenizer, config = load_any(name)
    if chat and tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        ids = ids["input_ids"]
    else:
        # With the special tokens that the model was trained to begin a text with, unlike `encode`.
        ids = tokenizer(prompt, return_tensors="pt").input_ids
    if not ids.numel():
        raise ValueError(f"generate: the prompt must have a token at least, got {prompt!r}; pass what to continue")
    keywords: dict[str, Any] = {}
    if config is not None and config.kv_bits != 16:
        from ..nn.kv_cache import QuantizedKVCache

        keywords["past_key_values"] = QuantizedKVCache(model.config, clip=config.kv_clip)
    with torch.inference_mode():
        output = model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, **keywords
        )
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
