"""``rcp-kernels generate``: a model's continuation of a prompt."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..evaluation.decoding import decode_loop
from ..evaluation.static_cache import static_cache
from ..hardware import to_device_of
from ..models.hf import cache_keyword
from .evaluate import attend_packed, check_positions, say
from .load import load_any

__all__ = ["check_sampling", "generate"]

Log = Callable[[str], None]


def check_sampling(temperature: float | None, top_p: float | None, seed: int | None) -> None:
    """Refuse sampling options that are out of range; None is allowed for each.

    Raises:
        ValueError: names the option.
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


def _prompt_ids(tokenizer: Any, prompt: str, chat: bool) -> Tensor:
    """A prompt as int64 [1, tokens], in the chat template if asked for and there is one."""
    if chat and tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        found = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        # Unlike `encode`, with the special tokens that the model was trained to begin a text with.
        found = tokenizer(prompt, return_tensors="pt")
    ids: Tensor = found["input_ids"]
    if not ids.numel():
        raise ValueError(f"generate: the prompt must have a token at least, got {prompt!r}; pass what to continue")
    return ids


def _make_cache(model: nn.Module, kv_bits: int, clip: float, capacity: int, alone: bool, log: Log) -> Any:
    """The cache for a prompt and its continuation, or None for the one that transformers makes.

    Args:
        alone: one token is fed at a time, and no beams.
    """
    settings: Any = model.config
    if kv_bits != 16:
        from ..nn.kv_cache import QuantizedKVCache

        packed = attend_packed(model, log)
        # Where each step dequantizes the cache, it should be no larger than the text.
        return QuantizedKVCache(settings, clip, capacity, static=packed)
    # A GPU captures a step on a cache of fixed capacity. On the CPU attention would read the whole capacity.
    if alone and next(model.parameters()).device.type != "cpu" and getattr(model, "_can_compile_fullgraph", False):
        return static_cache(model, capacity)
    return None


def _fuse(model: nn.Module, log: Log) -> None:
    """Fuse a quantized model's decoder layers. Log a line if that is not possible."""
    from ..nn import fuse_decoder

    try:
        fuse_decoder(model)
    except ValueError as error:
        log(f"generate: the layers run unfused, which is slower: {str(error).partition('; ')[0]}")


# More than 60 lines: 32 are the signature and the docstring.
def generate(
    name: str | Path,
    prompt: str,
    *,
    new_tokens: int = 64,
    chat: bool = True,
    temperature: float | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    log: Log = say,
) -> str:
    """The continuation of a prompt, with the key/value cache that the model's config asks for.

    Decoding is greedy unless temperature, top_p or seed is given; then the tokens are sampled. The layers of a
    quantized model are fused where :func:`rcp_kernels.nn.fuse_decoder` allows it.

    Args:
        name: as for :func:`evaluate`.
        prompt: text.
        new_tokens: at most so many tokens are added.
        chat: put the prompt into the model's chat template, if it has one.
        temperature: logits are divided by it before a token is sampled. None: 1.
        top_p: sample among the likeliest tokens that together have this probability, in (0, 1]. None: 1.
        seed: the same seed samples the same tokens on the same device. None: other tokens each time.
        device, dtype: as for :func:`rcp_kernels.pipeline.load.load_any`.
        log: called with a warning if the text may become longer than the model's max_position_embeddings, if its
            attention cannot read the packed cache, or if its layers cannot be fused. The default prints to standard
            error.

    Raises:
        MissingExtra, ValueError, OSError: as loading raises them; an option out of range; a prompt without a token.
    """
    check_sampling(temperature, top_p, seed)
    if new_tokens < 1:
        raise ValueError(f"generate: new_tokens must be at least 1, got {new_tokens}; ask for one token")
    model, tokenizer, config = load_any(str(name), device, dtype)
    ids = _prompt_ids(tokenizer, prompt, chat)
    check_positions("generate", model, ids.shape[1] + new_tokens, "prompt and new tokens", log)
    options: dict[str, Any] = {
        "max_new_tokens": new_tokens,
        "do_sample": (temperature, top_p, seed) != (None, None, None),
        # None overrides the model's generation_config and transformers' own top_k of 50.
        "temperature": None if temperature is None else float(temperature),
        "top_p": None if top_p is None else float(top_p),
        "top_k": None,
    }
    generation: Any = model.generation_config
    alone = generation.get_generation_mode().value in ("greedy_search", "sample")
    kv_bits, clip = (16, 1.0) if config is None else (config.kv_bits, config.kv_clip)
    cache = _make_cache(model, kv_bits, clip, ids.shape[1] + new_tokens, alone, log)
    if cache is not None:
        # The model's generation_config may ask for another cache, or for none.
        options.update({cache_keyword(model): cache, "cache_implementation": None, "use_cache": True})
    if config is not None:
        _fuse(model, log)
    if alone:
        options["custom_generate"] = decode_loop
    ids = to_device_of(model, ids)
    others = [] if ids.device.type == "cpu" else [ids.device]
    with torch.random.fork_rng(others, device_type=ids.device.type), torch.inference_mode():
        if seed is None:
            torch.seed()
        else:
            torch.manual_seed(seed)
        output = model.generate(ids, attention_mask=torch.ones_like(ids), **options)  # type: ignore[operator]
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
