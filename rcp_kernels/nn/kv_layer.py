"""The layers of the packed key-value cache: their storage, which grows or stays, and their length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import extras
from ..ops.kv_cache import KVStorage, empty_kv_cache, kv_cache_append, kv_cache_attention, kv_cache_dequantize
from .online_rotation import OnlineRotation

extras.require("transformers")

from transformers.cache_utils import CacheLayerMixin  # noqa: E402

__all__ = ["ATTENTION", "HANDLE", "QuantizedKVLayer", "SharedLength", "StaticQuantizedKVLayer"]

ATTENTION = "rcp_kv4"
HANDLE = "_rcp_kv_layer"
"""The attribute of returned keys that refers to their layer, for the attention function."""


class QuantizedKVLayer(CacheLayerMixin):
    """Keys and values of one layer, packed.

    Attributes:
        length: positions held, for every sequence of the batch. Read only outside of a compiled or captured step.
        unread: whether keys were returned under ``"rcp_kv4"`` and have not reached its attention function.
        storage: the packed tensors. There is none before the first tokens.
    """

    storage: KVStorage
    length: int = 0

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
        keys = key_states if self.key_rotation is None else self.key_rotation(key_states)
        self._append(keys, value_states)
        if packed:
            self.unread = True
            handle = key_states.detach()
            setattr(handle, HANDLE, self)
            return handle, value_states
        return self._read(self._positions(), key_states.dtype)

    def _append(self, keys: Tensor, values: Tensor) -> None:
        if not self.is_initialized or (self.length == 0 and self.storage.key_codes.shape[0] != keys.shape[0]):
            self.lazy_initialization(keys, values)
        tokens = keys.shape[2]
        self._reserve(self.length + tokens)
        kv_cache_append(keys, *self.storage[:2], self.length, self._clip)
        kv_cache_append(values, *self.storage[2:], self.length, self._clip)
        self.length += tokens

    def dequantize(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """All keys, with the rotation undone, and values: [batch, kv_heads, length, head_dim]."""
        return self._read(self.length, dtype)

    def _positions(self) -> int:
        """Positions that an attention of transformers gets."""
        return self.length

    def _read(self, positions: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        keys = kv_cache_dequantize(*self.storage[:2], positions, self.head_dim, dtype)
        values = kv_cache_dequantize(*self.storage[2:], positions, self.head_dim, dtype)
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
            if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise ValueError(
                    f"QuantizedKVCache: a captured step must not grow the cache beyond its capacity, {have}, "
                    f"got {length} positions; pass static=True and a larger capacity"
                )
            # Doubling copies each position once on average.
            more = max(length, 2 * have) - have
            self._map(lambda x: torch.cat([x, x.new_zeros(*x.shape[:2], more, x.shape[3])], dim=2))


class SharedLength:
    """What the layers of a static cache share: the number of positions held, and whose call counts them."""

    held: Tensor | None = None


class StaticQuantizedKVLayer(QuantizedKVLayer):
    """A layer whose storage has a fixed capacity, and whose length is a tensor: each step is the same call."""

    # transformers then gives each step a mask, and compiles the steps of `generate` on CUDA.
    is_compileable = True

    def __init__(self, shared: SharedLength, *, capacity: int, **settings: Any) -> None:
        super().__init__(capacity=capacity, **settings)
        self._shared = shared
        self._counts = False
        self._returned = capacity

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        if self._shared.held is None:
            # The first layer counts the positions for all layers: one small launch in a step instead of one a layer.
            self._counts = True
            with torch.inference_mode(False):  # a tensor made in inference mode could not change outside of it
                self._shared.held = torch.zeros((), dtype=torch.int64, device=self.device)
        if self.device.type == "cuda":
            # torch.compile(mode="reduce-overhead") captures tensors that it changes only at addresses that stay.
            for tensor in (*self.storage, self._shared.held):
                torch._dynamo.mark_static_address(tensor)

    @property
    def length(self) -> int:
        return 0 if self._shared.held is None else int(self._shared.held)

    @length.setter
    def length(self, value: int) -> None:
        # Crop and reset reach every layer. One of them changes the number that all share.
        if self._counts and self._shared.held is not None:
            self._shared.held.fill_(value)

    def _append(self, keys: Tensor, values: Tensor) -> None:
        # transformers sizes the first mask by the tokens, as there is no layer yet. Later masks have the capacity, and
        # hide the positions that are not held.
        self._returned = self._capacity if self.is_initialized else keys.shape[2]
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        held, tokens = self._shared.held, keys.shape[2]
        # The other layers run after the count.
        position = 0 if self._counts else -tokens
        kv_cache_append(keys, *self.storage[:2], position, self._clip, held)
        kv_cache_append(values, *self.storage[2:], position, self._clip, held)
        if self._counts and held is not None:
            held.add_(tokens)

    def _positions(self) -> int:
        return self._returned

    def attention(self, query: Tensor, scale: float | None, causal: bool, window: int, mask: Tensor | None) -> Tensor:
        if self.key_rotation is not None:
            query = self.key_rotation(query)
        if mask is not None and mask.shape[-1] < self._capacity:  # the first mask: see _append
            mask = nn.functional.pad(mask, (0, self._capacity - mask.shape[-1]), value=False)
        return kv_cache_attention(query, self.storage, 0, scale, causal, window, mask, self._shared.held)

    def get_seq_length(self) -> Any:
        return 0 if self._shared.held is None else self._shared.held

    def get_max_length(self) -> int:
        return self._capacity

    get_max_cache_shape = get_max_length

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        return self._capacity, 0
