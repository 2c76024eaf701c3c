"""``rcp-kernels eval`` and ``rcp-kernels generate``: what a quantized, or float, model does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..methods.student import FakeQuantKV
from ..perplexity import perplexity
from .sources import encode, held_out_text, load_any

__all__ = ["Measured", "evaluate", "generate", "with_quantized_cache"]


@dataclasses.dataclass(frozen=True)
class Measured:
    """A perplexity and what it was measured on."""

    model: str
    perplexity: float
    text: str
    tokens: int
    window: int
    kv_bits: int


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
    progress: Callable[[int], None] | None = None,
) -> Measured:
    """Perplexity of a model, quantized or float, with the cache that it is meant for.

    Args:
        name: a directory that quantize wrote, or what it takes as MODEL.
        text, dataset: see ``sources.held_out_text``.
        tokens: of the text, at most.
        window: tokens of a window.
        progress: called with the tokens done.

    Raises:
        MissingExtra, ValueError, OSError: as loading and :func:`perplexity` raise them.
    """
    model, tokenizer, config = load_any(name)
    words, source = held_out_text(text, dataset, tokens)
    ids = encode(tokenizer, words)[:tokens]
    kv_bits, clip = (16, 1.0) if config is None else (config.kv_bits, config.kv_clip)
    value = perplexity(with_quantized_cache(model, kv_bits, clip), ids, window, progress)  # type: ignore[arg-type]
    return Measured(name, value, source, ids.numel() // window * window, window, kv_bits)


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
        ids = encode(tokenizer, prompt).unsqueeze(0)
    keywords: dict[str, Any] = {}
    if config is not None and config.kv_bits != 16:
        from ..nn.kv_cache import QuantizedKVCache

        keywords["past_key_values"] = QuantizedKVCache(model.config, clip=config.kv_clip)
    with torch.inference_mode():
        output = model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, **keywords
        )
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
