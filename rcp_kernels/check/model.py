"""Cases of a whole model: quantized, saved, loaded, decoded on a device as on the CPU; and a captured decode step."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import extras
from ..checkpoint import QuantizationConfig, load_quantized, save_quantized
from ..evaluation.decoding import Decoder
from ..evaluation.static_cache import static_cache
from ..models.hf import cache_argument
from ..nn.quant_linear import QuantLinear
from ..nn.quantize_model import quantize_model
from .cases import Case, Comparison, Skipped, exactly, within

__all__ = ["model_cases", "small_llama"]

_PROMPT, _NEW_TOKENS, _CAPACITY = 12, 24, 64
_VOCABULARY = 128
# Weights and inputs of each model. With 16 bits no input is rounded, and float32 sums are the only difference.
_FORMATS = ((4, 16), (3, 8), (2, 4))
# The logits of a token after one input was rounded to its neighbour, as a share of their range. Float32 sums in another
# order move an input across a rounding boundary about once in 10^6.
_ROUNDED_SHARE = 0.05
_SAME = "the same tokens"


def model_cases() -> list[Case]:
    """A random LLaMA of two layers in three formats, with a float cache and with a 4-bit cache."""
    cases: list[Case] = []
    for bits, act_bits in _FORMATS:
        name = f"LLaMA of 2 layers, W{bits}A{act_bits}, {_NEW_TOKENS} tokens after {_PROMPT}"
        kind = f"W{bits}A{act_bits}"
        packed_name = f"{name}, 4-bit KV cache"
        cases += [
            Case("quantize_model", kind, name, "1 of 1000 codes", partial(_quantized, bits, act_bits)),
            Case("save, load, decode", kind, name, _SAME, partial(_decoded, bits, act_bits, False)),
            Case("save, load, decode", kind, packed_name, _SAME, partial(_decoded, bits, act_bits, True)),
            Case("captured decode", kind, name, _SAME, partial(_captured, bits, act_bits, False)),
            Case("captured decode", kind, packed_name, _SAME, partial(_captured, bits, act_bits, True)),
        ]
    return sorted(cases, key=lambda case: case.op == "captured decode")


def small_llama() -> nn.Module:
    """LlamaForCausalLM of two layers with random float32 weights, the same in every run."""
    extras.require("transformers", "safetensors")
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=_VOCABULARY,
        max_position_embeddings=_CAPACITY,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def _need_transformers() -> None:
    missing = [name for name in ("transformers", "safetensors") if not extras.EXTRAS[name].found]
    if missing:
        raise Skipped(f"{' and '.join(missing)} not installed; {extras.EXTRAS[missing[0]].install}")


def _prompt() -> Tensor:
    return torch.randint(0, _VOCABULARY, (1, _PROMPT), generator=torch.Generator().manual_seed(1))


def _pack(model: nn.Module, bits: int, act_bits: int) -> nn.Module:
    quantize_model(model, bits, 32, act_bits)
    return model


def _quantized(bits: int, act_bits: int, device: torch.device) -> Iterator[Comparison]:
    """Quantized on the device beside quantized on the CPU. A level search there may round a level differently."""
    _need_transformers()
    models = [_pack(small_llama().to(where), bits, act_bits) for where in (torch.device("cpu"), device)]
    weights: list[list[Tensor]] = [
        [module.packed_weight().unpack().cpu() for module in model.modules() if isinstance(module, QuantLinear)]
        for model in models
    ]
    codes = [torch.cat([weight.flatten() for weight in found]) for found in weights]
    share = (codes[0] != codes[1]).double().mean()
    yield within("share of codes that differ", share, torch.zeros(()), 1e-3)


def _decoded(bits: int, act_bits: int, packed_cache: bool, device: torch.device) -> Iterator[Comparison]:
    """Tokens of the saved model, loaded on the CPU and on the device."""
    _need_transformers()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        config = QuantizationConfig(bits, 32, act_bits, kv_bits=4 if packed_cache else 16)
        save_quantized(_pack(small_llama(), bits, act_bits), path, config)
        models = [load_quantized(path, where)[0] for where in ("cpu", device)]
    if packed_cache:
        for model in models:
            _use_packed_cache(model)
    new_cache = _packed_cache if packed_cache else _float_cache
    found = [_greedy(model, new_cache(model)) for model in models]
    tokens, logits = found[0]
    share = ((found[1][1] - logits)[0].abs().amax() / (logits.max() - logits.min())).double()
    allowed = 1e-4 if act_bits == 16 and not packed_cache else _ROUNDED_SHARE
    yield within("logits of the first step, as a share of their range", share, torch.zeros(()), allowed)
    yield exactly("tokens", found[1][0], tokens)


def _use_packed_cache(model: nn.Module) -> None:
    from ..nn.kv_cache import use_packed_attention

    reason = use_packed_attention(model)
    if reason is not None:
        raise RuntimeError(reason)


def _packed_cache(model: nn.Module) -> Any:
    from ..nn.kv_cache import QuantizedKVCache

    return QuantizedKVCache(model.config)


def _float_cache(model: nn.Module) -> Any:
    from transformers import DynamicCache

    return DynamicCache()


@torch.inference_mode()
def _greedy(model: nn.Module, cache: Any) -> tuple[Tensor, Tensor]:
    """Greedy tokens, int64 [new tokens], and the logits of every step, [new tokens, vocabulary], on the CPU."""
    arguments = cache_argument(model, cache)
    token = _prompt().to(next(model.parameters()).device)
    tokens, logits = [], []
    for _ in range(_NEW_TOKENS):
        out: Tensor = model(token, use_cache=True, logits_to_keep=1, **arguments).logits[:, -1]
        token = out.argmax(-1, keepdim=True)
        tokens.append(token.cpu().flatten())
        logits.append(out.cpu())
    return torch.cat(tokens), torch.cat(logits)


def _captured(bits: int, act_bits: int, packed_cache: bool, device: torch.device) -> Iterator[Comparison]:
    """Tokens of a replayed graph beside those of the same steps without a graph."""
    if device.type != "cuda":
        raise Skipped("not CUDA")
    _need_transformers()
    model = _pack(small_llama(), bits, act_bits).to(device)
    sequences = []
    # A Decoder with a forward of its own does not capture it.
    for forward in (model, None):
        cache = static_cache(model, _PROMPT + _NEW_TOKENS, packed_cache)
        decoder = Decoder(model, _prompt(), cache=cache, forward=forward)
        tokens = [decoder.token]
        for _ in range(_NEW_TOKENS):
            decoder.step()
            tokens.append(decoder.token)
        sequences.append(torch.cat(tokens))
    if not decoder.captured:
        raise RuntimeError("the decode step was not captured in a CUDA graph")
    yield exactly("tokens of the graph", sequences[1], sequences[0])
