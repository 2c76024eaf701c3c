"""A transformers Cache that holds keys and values in 4 bits, and attention that reads it packed (docs/kv_cache.md).

Importing this module imports transformers and registers the attention implementation ``"rcp_kv4"``.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .. import extras
from ..models.hf import cache_argument
from ..ops.checks import check_clip, check_int
from .online_rotation import OnlineRotation

extras.require("transformers")

from transformers import AttentionInterface  # noqa: E402
from transformers.cache_utils import Cache  # noqa: E402
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask  # noqa: E402

from .kv_layer import ATTENTION, HANDLE, QuantizedKVLayer, SharedLength, StaticQuantizedKVLayer  # noqa: E402

__all__ = [
    "ATTENTION",
    "MOST_QUERIES",
    "QuantizedKVCache",
    "QuantizedKVLayer",
    "UnsupportedAttention",
    "use_packed_attention",
]

# Positions that are reserved with the first tokens.
_CAPACITY = 256

MOST_QUERIES = 16
"""The most query tokens that read the cache packed. For more, dequantizing the cache once is faster, as torch's
attention has tiles for many queries."""


class UnsupportedAttention(ValueError):
    """The model's attention has a part that ``"rcp_kv4"`` does not have."""


def _reads_packed(config: Any) -> bool:
    """Whether a model's attention reads the cache packed. A function, because pickle cannot store a lambda."""
    return config is not None and config._attn_implementation == ATTENTION


class QuantizedKVCache(Cache):
    """A transformers Cache of 4-bit keys and values: 4.5 bits a number at head_dim 64 (RCP's KV4, arXiv 2502.15779).

    When a token is appended, the key (after RoPE) and the value of each head are quantized asymmetrically, as
    ``ops.fake_quantize_kv`` says. They are not requantized later, and the cache keeps no float copy. All tokens attend
    to the quantized keys and values, also those of the prompt.

    The cache works under any attention implementation. ``model.set_attn_implementation("rcp_kv4")`` reads it packed
    while decoding. Layers with a sliding window keep all positions; the mask hides the old ones.
    """

    def __init__(
        self,
        config: Any = None,
        clip: float = 1.0,
        capacity: int = _CAPACITY,
        key_rotation: OnlineRotation | None = None,
        *,
        static: bool = False,
    ) -> None:
        """An empty cache.

        Args:
            config: ``model.config``. Each call reads the attention implementation from it. Without a config, or if
                the implementation is not ``"rcp_kv4"``, each call dequantizes keys and values.
            clip: in (0, 1]. QuaRot uses 0.95.
            capacity: positions to reserve with the first tokens. Beyond it storage doubles, or raises if static.
            key_rotation: R3, of size head_dim. Queries and keys are rotated before the keys are quantized; returned
                keys are rotated back. Leave it out for a model that rotates queries and keys itself.
            static: keep the capacity, and the length in a tensor on the device. A step can then be compiled or captured
                once for all lengths. ``get_seq_length()`` gives that tensor, as transformers' StaticCache does. A full
                cache raises on the CPU; on CUDA its attention gives NaN.

        Raises:
            ValueError: a clip outside (0, 1], or a capacity below 1.
        """
        check_clip("QuantizedKVCache", clip)
        check_int("QuantizedKVCache", "capacity", capacity, remedy="pass the expected number of positions")
        text_config = config.get_text_config(decoder=True) if config is not None else None
        make: Any = functools.partial(
            functools.partial(StaticQuantizedKVLayer, SharedLength()) if static else QuantizedKVLayer,
            packed=functools.partial(_reads_packed, text_config),
            clip=clip,
            capacity=capacity,
            key_rotation=key_rotation,
        )
        super().__init__(layer_class_to_replicate=make)

    @property
    def nbytes(self) -> int:
        """Bytes of storage of all layers, the positions reserved for later tokens included."""
        layers: list[Any] = self.layers
        return sum(layer.nbytes for layer in layers)

    def dequantize(self, layer_idx: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Keys, with key_rotation undone, and values of a layer, [batch, kv_heads, length, head_dim]."""
        layer: Any = self.layers[layer_idx]
        return layer.dequantize(dtype)


def _packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: out [batch, queries, heads, head_dim], and no weights.

    At most MOST_QUERIES queries read the packed cache. More queries, a mask of numbers, and keys that do not come from
    the cache go to torch's attention.
    """
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise UnsupportedAttention(
                f"{ATTENTION}: attention must have no {name}, which the kernel does not compute, got one; use "
                f'set_attn_implementation("eager") with the same cache'
            )
    layer = getattr(key, HANDLE, None)
    if layer is not None:
        layer.unread = False
    boolean = attention_mask is None or attention_mask.dtype == torch.bool
    if layer is None or query.shape[2] > MOST_QUERIES or not boolean:
        if layer is not None:
            key, value = layer.dequantize(query.dtype)
            if attention_mask is not None:
                attention_mask = attention_mask[..., : layer.length]
            elif layer.length > query.shape[2] > 1:
                # torch's causal mask assumes that queries start at the first position.
                own = torch.arange(layer.length - query.shape[2], layer.length, device=query.device)
                attention_mask = torch.arange(layer.length, device=query.device) <= own[:, None]
                attention_mask = attention_mask[None, None]
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **kwargs
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    mask = attention_mask
    if mask is not None and not isinstance(layer, StaticQuantizedKVLayer):
        mask = mask[..., : layer.length]
    # A mask includes the window. The kernel gets the window too, and does not read the positions outside of it.
    out = layer.attention(query, scaling, causal and attention_mask is None, sliding_window or 0, mask)
    return out.transpose(1, 2).contiguous(), None


def use_packed_attention(model: Any) -> str | None:
    """Give a model the attention implementation ``"rcp_kv4"``, if that computes the model's attention.

    One token goes through the model as a test. If the test fails, the model keeps its implementation.

    Args:
        model: a causal language model of transformers.

    Returns:
        None, or the reason why the model kept its implementation.
    """
    before = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    cache = QuantizedKVCache(model.config)
    reason = None
    try:
        with torch.inference_mode():
            token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
            model(token, **cache_argument(model, cache), use_cache=True)
    except UnsupportedAttention as error:
        reason = str(error).partition("; ")[0]
    layers: list[Any] = cache.layers
    if reason is None and (
        not _reads_packed(model.config.get_text_config(decoder=True)) or any(layer.unread for layer in layers)
    ):
        reason = f"{ATTENTION}: {type(model).__name__} does not call the attention function of its config"
    if reason is not None:
        model.set_attn_implementation(before)
    return reason


def _packed_mask(attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """transformers' mask interface: no mask for one query that sees all positions before it, as the kernel says so."""
    plain = kwargs.get("mask_function", causal_mask_function) is causal_mask_function
    # transformers 5.0 passes the positions of the queries.
    queries = kwargs["q_length"] if "q_length" in kwargs else len(kwargs["cache_position"])
    if attention_mask is None and plain and queries == 1:
        return None
    return sdpa_mask(attention_mask=attention_mask, **kwargs)


AttentionInterface.register(ATTENTION, _packed_attention)
AttentionMaskInterface.register(ATTENTION, _packed_mask)
