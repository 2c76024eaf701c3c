"""Decoding of a LLaMA with random weights, one CUDA graph a token: packed layers against float layers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..evaluation.decoding import Decoder
from ..evaluation.static_cache import static_cache
from ..formats import PackedWeight
from ..nn.quant_linear import QuantLinear
from .decode import SHAPES, random_model, weight_counts
from .lut_linear import group_size_for, random_packed_weight

__all__ = ["SMALL_SHAPE", "decode_seconds", "fitting_layers", "packed_name"]

SMALL_SHAPE: Mapping[str, int] = {
    "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 8, "vocab_size": 4096,
}  # fmt: skip
"""Arguments of LlamaConfig for a run that only shows that it works."""

_CONTEXT = 128
_LAYERS = 32
# For activations, the cache and what else runs on the card.
_SLACK_BYTES = 2 << 30


def packed_name(bits: int, act_bits: int, kv_bits: int) -> str:
    """``W2A4``, and ``W2A4KV4`` with a 4-bit cache."""
    return f"W{bits}A{act_bits}{f'KV{kv_bits}' if kv_bits == 4 else ''}"


def fitting_layers(device: torch.device) -> int:
    """Decoder layers of LLaMA-2-7B in float16 that fit on a card, at most all 32; two on other devices."""
    if device.type != "cuda":
        return 2
    linears, others = weight_counts(SHAPES["llama-2-7b"])
    free = torch.cuda.mem_get_info(device)[0] - 2 * others - _SLACK_BYTES
    return max(1, min(_LAYERS, free // (2 * linears // _LAYERS)))


def decode_seconds(
    shape: Mapping[str, int],
    device: torch.device,
    formats: tuple[tuple[int, int, int], ...] = ((2, 4, 16),),
    new_tokens: int = 50,
) -> Iterator[tuple[str, float]]:
    """Median seconds per token at batch 1 of the float model and of each packed model, after 128 tokens.

    On CUDA a token is a replay of one CUDA graph and the choice of the token, timed by events. The weights outgrow L2.
    Elsewhere a token is an eager step by the clock. Each model is built, measured and freed before the next.

    Args:
        shape: arguments of LlamaConfig.
        formats: (bits, act_bits, kv_bits) of each packed model; kv_bits 4 is the packed cache, 16 transformers' own.
        new_tokens: timed tokens.

    Yields:
        The name of a model, "torch fp16" on CUDA and "torch bf16" elsewhere for the float one, and its seconds.
    """
    dtype = torch.float16 if device.type == "cuda" else torch.bfloat16

    def dense(out_features: int, in_features: int) -> nn.Module:
        layer = nn.Linear(in_features, out_features, bias=False, device="meta")
        weight = torch.randn(out_features, in_features, device=device).mul_(in_features**-0.5).to(dtype)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        return layer

    yield f"torch {'fp16' if dtype == torch.float16 else 'bf16'}", _measure(shape, dense, device, dtype, new_tokens)
    for bits, act_bits, kv_bits in formats:
        build = _packed(bits, act_bits, device)
        yield packed_name(bits, act_bits, kv_bits), _measure(shape, build, device, dtype, new_tokens, kv_bits == 4)


def _packed(bits: int, act_bits: int, device: torch.device) -> Callable[[int, int], nn.Module]:
    weights: dict[tuple[int, int], PackedWeight] = {}

    def build(out_features: int, in_features: int) -> nn.Module:
        size = (out_features, in_features)
        if size not in weights:
            group_size = group_size_for(in_features, 128)
            weights[size] = random_packed_weight(*size, bits, group_size).to(device)
        # Each layer packs a copy of its own: a weight that is used twice in a token would come from L2.
        return QuantLinear.from_packed(weights[size], act_bits=act_bits)

    return build


def _measure(
    shape: Mapping[str, int],
    linear: Callable[[int, int], nn.Module],
    device: torch.device,
    dtype: torch.dtype,
    new_tokens: int,
    packed_cache: bool = False,
) -> float:
    model = random_model(shape, linear, {}).to(device=device, dtype=dtype)
    prompt: Tensor = torch.randint(0, 32, (1, _CONTEXT), device=device)
    # Beside the timed steps: one that captures the graph, or finds its caches cold, and one that raises the clock.
    decoder = Decoder(model, prompt, cache=static_cache(model, _CONTEXT + 2 + new_tokens, packed_cache))
    for _ in range(2):
        decoder.step()
    decoder.wait()
    if device.type != "cuda":
        return _clocked(decoder, new_tokens)
    if not decoder.captured:
        raise RuntimeError("the decode step was not captured in a CUDA graph")
    events: list[tuple[Any, Any]] = []
    for _ in range(new_tokens):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        decoder.step()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize(device)
    return statistics.median(start.elapsed_time(end) / 1e3 for start, end in events)


def _clocked(decoder: Decoder, new_tokens: int) -> float:
    samples = []
    for _ in range(new_tokens):
        start = time.perf_counter()
        decoder.step()
        decoder.wait()
        samples.append(time.perf_counter() - start)
    return statistics.median(samples)
