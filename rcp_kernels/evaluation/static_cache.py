"""A cache of fixed capacity, with which a decode step is the same launches for every token."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..models.hf import croppable

__all__ = ["static_cache"]


def static_cache(model: nn.Module, capacity: int, packed: bool = False) -> Any:
    """An empty cache for :class:`rcp_kernels.evaluation.decoding.Decoder`, which captures its steps on CUDA.

    Args:
        model: a causal language model of transformers.
        capacity: positions, prompt included.
        packed: keys and values in 4 bits, which the model's attention then reads packed. Otherwise in its dtype.

    Raises:
        ValueError: the model's attention cannot read a packed cache.
    """
    config: Any = model.config
    if packed:
        from ..nn.kv_cache import QuantizedKVCache, use_packed_attention

        reason = use_packed_attention(model)
        if reason is not None:
            raise ValueError(f"static_cache: packed must be False for this model: {reason}")
        return QuantizedKVCache(config, capacity=capacity, static=True)
    from transformers import StaticCache

    return croppable(StaticCache(config, max_cache_len=capacity))
