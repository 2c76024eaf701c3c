"""A transformers Cache that holds keys and values in 4 bits, and attention that reads it packed (docs/kv_cache.md).

Importing this module imports transformers and registers the attention implementation ``"rcp_kv4"``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import extras
from ..models.hf import cache_argument
from ..ops.checks import check_clip, check_int
from ..ops.kv_cache import KVStorage, empty_kv_cache, kv_cache_append, kv_cache_attention, kv_cache_dequantize
from .online_rotation import OnlineRotation

extras.require("transformers")

from transformers import AttentionInterface  # noqa: E402
from transformers.cache_utils import Cache, CacheLayerMixin  # noqa: E402
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask  # noqa: E402

__all__ = [
    "ATTENTION",
    "MOST_QUERIES",
    "QuantizedKVCache",
    "QuantizedKVLayer",
    "UnsupportedAttention",
    "use_packed_attention",
]

ATTENTION = "rcp_kv4"

# Storage grows by this many positions. Growing then copies 1/256 of the cache per token, and wastes fewer than 256
# positions.
_GROWTH = 256

MOST_QUERIES = 16
"""The most query tokens that read the cache packed. For more, dequantizing the cache once is faster, as torch's
attention has tiles for many queries."""

_HANDLE = "_rcp_kv_layer"


class UnsupportedAttention(ValueError):
    """The model's attention has a part that ``"rcp_kv4"`` does not have."""


class QuantizedKVLayer(CacheLayerMixin):
    """Keys and values of one layer, packed.

    Attributes:
        length: positions held, for every sequence of the batch.
        unread: whether keys were returned under ``"rcp_kv4"`` and have not reached its attention function.
        storage: the packed tensors. There is none before the first tokens.
    """

    storage: KVStorage

    is_croppable = True
    supports_early_init = False

    def __init__(
        self, packed: Callable[[], bool], clip: float, capacity: int, key_rotation: OnlineRotation | None
    ) -> None:
        super().__init__()
        self.is_initialized = False
        self._packed = packed
        self._clip = clip
        self._capacity = capacity
        self.key_rotation = key_rotation
        self.length = 0
        self.unread = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads, _, self.head_dim = key_states.shape
        if value_states.shape != key_states.shape:
            raise ValueError(
                f"QuantizedKVCache: keys and values must have one shape, got {tuple(key_states.shape)} and "
                f"{tuple(value_states.shape)}; models with another head_dim for values need another cache"
            )
        self.device = key_states.device
        shape = (batch, heads, self._capacity, self.head_dim, self.device)
        self.storage = KVStorage(*empty_kv_cache(*shape), *empty_kv_cache(*shape))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values [batch, kv_heads, tokens, head_dim]; return all keys and values, dequantized.

        Under the attention implementation ``"rcp_kv4"`` nothing is dequantized. The returned keys then only carry a
        reference to this layer, for the attention function.

        Raises:
            ValueError: a gradient is wanted, the shape differs from that of earlier tokens, there is NaN or Inf, or the
                keys of the last call never reached the function of ``"rcp_kv4"``.
        """
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise ValueError(
                "QuantizedKVCache: keys and values must not require grad, got some that do; call the model under "
                "torch.no_grad(), or train with ops.fake_quantize_kv and no cache"
            )
        packed = self._packed()
        if packed and self.unread:
            raise ValueError(
                f"QuantizedKVCache: under {ATTENTION!r} a model must pass the keys of the cache to its attention "
                f'unchanged, got one that does not; use set_attn_implementation("sdpa")'
            )
        if not self.is_initialized or (self.length == 0 and self.storage.key_codes.shape[0] != key_states.shape[0]):
            self.lazy_initialization(key_states, value_states)
        tokens = key_states.shape[2]
        self._reserve(self.length + tokens)
        keys = key_states if self.key_rotation is None else self.key_rotation(key_states)
        kv_cache_append(keys, *self.storage[:2], self.length, self._clip)
        kv_cache_append(value_states, *self.storage[2:], self.length, self._clip)
        self.length += tokens
        if packed:
            self.unread = True
            handle = key_states.detach()
            setattr(handle, _HANDLE, self)
            return handle, value_states
        return self.dequantize(key_states.dtype)

    def dequantize(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """All keys, with the rotation undone, and values: [batch, kv_heads, length, head_dim]."""
        keys = kv_cache_dequantize(*self.storage[:2], self.length, self.head_dim, dtype)
        values = kv_cache_dequantize(*self.storage[2:], self.length, self.head_dim, dtype)
        return keys if self.key_rotation is None else self.key_rotation.inverse(keys), values

    def attention(self, query: Tensor, scale: float | None, causal: bool, window: int, mask: Tensor | None) -> Tensor:
        """``ops.kv_cache_attention`` of query [batch, heads, queries, head_dim] on all positions held."""
        if self.key_rotation is not None:
            query = self.key_rotation(query)
        return kv_cache_attention(query, self.storage, self.length, scale, causal, window, mask)

    @property
    def nbytes(self) -> int:
        """Bytes of storage, the positions reserved for later tokens included."""
        return sum(tensor.nbytes for tensor in self.storage) if self.is_initialized else 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        # Some releases of transformers pass the positions of the queries.
        queries = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.length + queries, 0

    def reset(self) -> None:
        """Forget all positions. Later tokens of the same batch size use the storage again."""
        self.length = 0
        self.unread = False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` positions. A positive number is the number of positions to keep."""
        if tokens_to_remove < 0:
            self.length = max(0, self.length + tokens_to_remove)
        elif tokens_to_remove > 0:
            self.length = min(self.length, tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda x: x[indices])

    def offload(self) -> None:
        self._map(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._map(lambda x: x.to(self.device, non_blocking=True))

    def _map(self, f: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            self.storage = KVStorage(*(f(tensor).contiguous() for tensor in self.storage))

    def _reserve(self, length: int) -> None:
        have = self.storage.key_codes.shape[2]
        if length > have:
            more = (length - have + _GROWTH - 1) // _GROWTH * _GROWTH
            self._map(lambda x: torch.cat([x, x.new_zeros(*x.shape[:2], more, x.shape[3])], dim=2))


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
        capacity: int = _GROWTH,
        key_rotation: OnlineRotation | None = None,
    ) -> None:
        """An empty cache.

        Args:
            config: ``model.config``. Each call reads the attention implementation from it. Without a config, or if
                the implementation is not ``"rcp_kv4"``, each call dequantizes keys and values.
            clip: in (0, 1]. QuaRot uses 0.95.
            capacity: positions to reserve with the first tokens. Beyond it storage grows by 256.
            key_rotation: R3, of size head_dim. Queries and keys are rotated before the keys are quantized; returned
                keys are rotated back. Leave it out for a model that rotates queries and keys itself.

        Raises:
            ValueError: a clip outside (0, 1], or a capacity below 1.
        """
        check_clip("QuantizedKVCache", clip)
        check_int("QuantizedKVCache", "capacity", capacity, remedy="pass the expected number of positions")
        text_config = config.get_text_config(decoder=True) if config is not None else None
        make: Any = functools.partial(
            QuantizedKVLayer,
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
    layer = getattr(key, _HANDLE, None)
    if layer is not None:
        layer.unread = False
    boolean = attention_mask is None or attention_mask.dtype == torch.bool
    if layer is None or query.shape[2] > MOST_QUERIES or not boolean:
        if layer is not None:
            key, value = layer.dequantize(query.dtype)
            if attention_mask is None and layer.length > query.shape[2] > 1:
                # torch's causal mask assumes that queries start at the first position.
                own = torch.arange(layer.length - query.shape[2], layer.length, device=query.device)
                attention_mask = torch.arange(layer.length, device=query.device) <= own[:, None]
                attention_mask = attention_mask[None, None]
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **kwargs
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    mask = None if attention_mask is None else attention_mask[..., : layer.length]
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


AttentionInterface.register(ATTENTION, _packed_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
