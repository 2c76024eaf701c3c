"""``rcp-kernels eval``: the perplexity of a model, and where its greedy decoding leaves another model's."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..data.by_name import Progress, held_out_text
from ..evaluation.decoding import greedy_tokens
from ..evaluation.divergence import divergence, prompt_windows
from ..evaluation.perplexity import perplexity
from ..hardware import to_device_of
from ..methods.layers import check_vocabulary
from ..methods.student import FakeQuantKV
from ..models.hf import cache_keyword
from ..models.load import encode
from .load import load_any

__all__ = [
    "GreedyDivergence",
    "Measured",
    "attend_packed",
    "check_positions",
    "evaluate",
    "say",
    "with_quantized_cache",
]

_PROMPTS = 16
_PROMPT_TOKENS = 64


@dataclasses.dataclass(frozen=True)
class GreedyDivergence:
    """A :class:`rcp_kernels.evaluation.divergence.Divergence` as numbers, with the model that it is measured from."""

    reference: str
    mean: float
    median: float
    agreement: float
    positions: tuple[int, ...]
    prompt_tokens: int
    new_tokens: int


@dataclasses.dataclass(frozen=True)
class Measured:
    """A perplexity with its conditions, and a divergence where one was asked for.

    Attributes:
        device: that the model was on.
        dtype: of everything in the model that is not packed.
    """

    model: str
    perplexity: float
    text: str
    tokens: int
    window: int
    kv_bits: int
    device: str
    dtype: str
    divergence: GreedyDivergence | None = None


def with_quantized_cache(model: nn.Module, kv_bits: int, kv_clip: float = 1.0) -> Callable[[Tensor], Any]:
    """The model as a function of token ids on any device, with keys and values as a cache of kv_bits gives them back.

    Args:
        model: a causal language model of transformers.
        kv_bits: 4, or 16 for keys and values as they are.
        kv_clip: in (0, 1]: the share of a token's range that 4 bits cover.
    """
    if kv_bits == 16:
        return lambda ids: model(to_device_of(model, ids), use_cache=False)
    keyword = cache_keyword(model)
    return lambda ids: model(to_device_of(model, ids), **{keyword: FakeQuantKV(kv_bits, kv_clip)}, use_cache=False)


def say(text: str) -> None:
    """Print to standard error: standard output holds results only."""
    print(text, file=sys.stderr, flush=True)


def _reading_packed(
    model: nn.Module, kv_clip: float, prompt_tokens: int, log: Callable[[str], None]
) -> Callable[[Tensor], Any]:
    """The model as a function of token ids that reads its packed 4-bit cache as decoding does.

    The tokens after the prompt run through the model in pieces of as many tokens as the packed attention takes.
    """
    from ..nn.kv_cache import MOST_QUERIES, QuantizedKVCache

    attend_packed(model, log)
    keyword = cache_keyword(model)

    def call(ids: Tensor) -> SimpleNamespace:
        ids = to_device_of(model, ids)
        cache = QuantizedKVCache(model.config, clip=kv_clip)
        pieces = (ids[:, :prompt_tokens], *ids[:, prompt_tokens:].split(MOST_QUERIES, dim=1))
        logits = [model(piece, **{keyword: cache}, use_cache=True).logits for piece in pieces if piece.shape[1]]
        return SimpleNamespace(logits=torch.cat(logits, dim=1))

    return call


def attend_packed(model: nn.Module, log: Callable[[str], None]) -> bool:
    """Let a model read its 4-bit cache packed. Log a line, and return False, if its attention cannot."""
    from ..nn.kv_cache import use_packed_attention

    reason = use_packed_attention(model)
    if reason is not None:
        config: Any = model.config
        log(f"{reason}; attention {config._attn_implementation!r} dequantizes the 4-bit cache instead")
    return reason is None


def check_positions(where: str, model: nn.Module, tokens: int, what: str, log: Callable[[str], None]) -> None:
    """Log a line if a sequence is longer than the model's max_position_embeddings."""
    config: Any = model.config
    positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if positions is not None and tokens > positions:
        log(
            f"{where}: warning: {what} should be at most {positions} tokens, the model's max_position_embeddings, got "
            f"{tokens}; ask for fewer: the model was not trained on later positions"
        )


# More than 60 lines: 25 are the docstring.
def evaluate(
    name: str | Path,
    text: str | Path | None = None,
    dataset: str | None = None,
    *,
    tokens: int = 4096,
    window: int = 512,
    divergence_from: str | Path | None = None,
    new_tokens: int = 128,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress = lambda *_: None,
    log: Callable[[str], None] = say,
) -> Measured:
    """The perplexity of a quantized or float model, with the key/value cache that its config asks for.

    For a 4-bit cache the perplexity has keys and values quantized and dequantized. The divergence reads the packed
    cache with the attention that decoding uses.

    Args:
        name: a directory that quantize wrote, or a float model as :class:`Recipe` takes it.
        text: a UTF-8 file to measure on. None: the dataset, or the topics of pydoc without a dataset.
        dataset: "wikitext", or the name of another dataset of the hub; its test split is used.
        tokens: at most so many tokens of the text are used.
        window: tokens of a window.
        divergence_from: also compare greedy decoding with this model's, after 16 prompts from the text.
        new_tokens: decoded after each of these prompts.
        device, dtype: as for :func:`rcp_kernels.pipeline.load.load_any`.
        progress: see :data:`rcp_kernels.data.by_name.Progress`.
        log: called with a warning if a window or a continuation is longer than the model's max_position_embeddings, or
            if its attention cannot read the packed cache. The default prints to standard error.

    Raises:
        MissingExtra, ValueError, OSError: as loading and :func:`perplexity` raise them; or the model to diverge from
            has another tokenizer or a 4-bit cache.
    """
    if new_tokens < 1:
        raise ValueError(f"eval: new_tokens must be at least 1, got {new_tokens}; ask for one token")
    if tokens < window:
        raise ValueError(f"eval: tokens must be at least window, {window}, got {tokens}; lower the window")
    words, source = held_out_text(None if text is None else Path(text), dataset, tokens)
    progress("reading the model", 0, 1, str(name))
    model, tokenizer, config = load_any(str(name), device, dtype)
    progress("reading the model", 1, 1, str(name))
    ids = encode(tokenizer, words)[:tokens]
    if ids.numel() < window:
        raise ValueError(
            f"eval: the text must have at least {window} tokens (window), got {ids.numel()}; pass more text or a "
            f"smaller window"
        )
    check_vocabulary(model, ids, "eval")
    check_positions("eval", model, window, "window", log)
    kv_bits, clip = (16, 1.0) if config is None else (config.kv_bits, config.kv_clip)
    called = with_quantized_cache(model, kv_bits, clip)
    used = ids.numel() // max(1, window) * window
    value = perplexity(
        called,  # type: ignore[arg-type]
        ids,
        window,
        lambda done: progress("perplexity", done, used, source),
    )
    unpacked = next(model.parameters())
    measured = Measured(
        str(name),
        value,
        source,
        used,
        window,
        kv_bits,
        str(unpacked.device),
        str(unpacked.dtype).removeprefix("torch."),
    )
    if divergence_from is None:
        return measured
    prompts = prompt_windows(ids, _PROMPTS, min(_PROMPT_TOKENS, max(1, ids.numel() // _PROMPTS)))
    length = prompts.shape[1]
    check_positions("eval", model, length + new_tokens, "prompt and new tokens", log)
    reference = _reference(str(divergence_from), words, ids, device, dtype)
    expected = greedy_tokens(reference, prompts, new_tokens, lambda done: progress("decoding", done, new_tokens, ""))
    if kv_bits != 16:
        called = _reading_packed(model, clip, length, log)
    found = divergence(called, prompts, expected)
    diverged = GreedyDivergence(
        str(divergence_from), found.mean, found.median, found.agreement, found.positions, length, new_tokens
    )
    return dataclasses.replace(measured, divergence=diverged)


def _reference(
    name: str, words: str, ids: Tensor, device: str | torch.device | None, dtype: torch.dtype | None
) -> nn.Module:
    """The model to diverge from, which must have the same tokenizer and a 16-bit cache."""
    model, tokenizer, config = load_any(name, device, dtype)
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
    return model
