"""Attention of one new token: rotary embedding, the cache, and the queries over it, in one operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["decode_attention", "decode_attention_reference"]


def decode_attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    length: int,
    scale: float,
    held: Tensor | None = None,
) -> Tensor:
    """Attention of one new token of each sequence to itself and all earlier tokens, on the CPU.

    Queries and the key get their rotary embedding. Key and value are written into the storage at position ``length``.
    The queries attend to positions 0 to ``length``. The embedding has the bits of separate operators in the dtype of
    qkv. The rest is float32 in one order, on every instruction set and with any number of threads (docs/numerics.md).
    Not differentiable.

    Args:
        qkv: float32, float16 or bfloat16 [batch, 1, (heads + 2 * kv_heads) * head_dim]: queries, keys, values. heads is
            a multiple of kv_heads; query head h reads head ``h // (heads // kv_heads)``.
        cos, sin: qkv.dtype [batch or 1, 1, head_dim], of the token's position.
        keys, values: qkv.dtype [batch, kv_heads, capacity, head_dim], contiguous; written at position length.
        length: positions that the storage holds before the call, below capacity; counted from ``held`` if that is
            given.
        scale: of the scores, for example ``head_dim ** -0.5``.
        held: int64 without dimensions, on the CPU.

    Returns:
        qkv.dtype [batch, 1, heads * head_dim].

    Raises:
        ValueError: a wrong dtype or shape, an odd head_dim, or no room for the token.
    """
    out = torch.ops.rcp_kernels.decode_attention.default(qkv, cos, sin, keys, values, length, scale, held)
    # torch's stable ABI cannot tell autograd that the storage has changed.
    if not torch.compiler.is_compiling():
        for tensor in (keys, values):
            if not tensor.is_inference():
                torch.autograd.graph.increment_version(tensor)
    return out


@torch.library.register_fake("rcp_kernels::decode_attention")
def _fake(qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, *rest: Any, **keywords: Any) -> Tensor:
    return qkv.new_empty((qkv.shape[0], 1, qkv.shape[2] - 2 * keys.shape[1] * keys.shape[3]))


def decode_attention_reference(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    length: int,
    scale: float,
    held: Tensor | None = None,
) -> Tensor:
    """:func:`decode_attention` in plain torch: the embedding in the dtype of qkv, the rest in float64.

    Keys and values are written into the storage, with the bits of the operator.

    Returns:
        float64 [batch, 1, heads * head_dim].
    """
    length += 0 if held is None else int(held)
    batch, kv_heads, _, dim = keys.shape
    tokens = qkv.view(batch, -1, dim)
    heads = tokens.shape[1] - 2 * kv_heads
    rotating = tokens[:, : heads + kv_heads]
    first, second = rotating.chunk(2, -1)
    rotating = rotating * cos + torch.cat((-second, first), -1) * sin
    keys[:, :, length] = rotating[:, heads:]
    values[:, :, length] = tokens[:, heads + kv_heads :]
    query = rotating[:, :heads].double().view(batch, kv_heads, heads // kv_heads, dim)
    all_keys, all_values = (x[:, :, : length + 1].double() for x in (keys, values))
    weights = torch.softmax(query @ all_keys.transpose(-1, -2) * scale, -1)
    return (weights @ all_values).view(batch, 1, heads * dim)
