"""Attention of one new token: rotary embedding, the cache, and the queries over it, in one operator."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["decode_attention", "decode_attention_reference"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def decode_attention(
    qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, length: int, scale: float
) -> Tensor:
    """Attention of one new token of each sequence to itself and all before it, on the CPU.

    Queries and the key get their rotary embedding, key and value are written into the storage at position ``length``,
    and the queries attend to positions 0 to ``length``. The embedding has the bits of separate operators in the dtype
    of qkv; the rest is float32 in one order on every instruction set and any number of threads (docs/numerics.md). Not
    differentiable.

    Args:
        qkv: float32, float16 or bfloat16 [batch, 1, (heads + 2 * kv_heads) * head_dim]: queries, keys, values. heads is
            a multiple of kv_heads; query head h reads head ``h // (heads // kv_heads)``.
        cos, sin: qkv.dtype [batch or 1, 1, head_dim], of the token's position.
        keys, values: qkv.dtype [batch, kv_heads, capacity, head_dim], contiguous; written at position length.
        length: positions held before, below capacity.
        scale: of the scores, ``head_dim ** -0.5`` say.

    Returns:
        qkv.dtype [batch, 1, heads * head_dim].

    Raises:
        ValueError: a wrong dtype or shape, an odd head_dim, or no room for the token.
    """
    out = torch.ops.rcp_kernels.decode_attention.default(qkv, cos, sin, keys, values, length, scale)
    # The library's stable ABI has no way to tell autograd that the storage has changed.
    if not torch.compiler.is_compiling():
        for tensor in (keys, values):
            if not tensor.is_inference():
                torch.autograd.graph.increment_version(tensor)
    return out


@torch.library.register_fake("rcp_kernels::decode_attention")
def _fake(qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, length: int, scale: float) -> Tensor:
    if qkv.dtype not in _DTYPES:
        raise ValueError(
            f"decode_attention: qkv must be float32, float16 or bfloat16, got {qkv.dtype}; convert it first"
        )
    if qkv.dim() != 3 or qkv.shape[1] != 1 or keys.dim() != 4:
        raise ValueError(
            f"decode_attention: qkv must be [batch, 1, features] and keys [batch, kv_heads, capacity, head_dim], got "
            f"shapes {tuple(qkv.shape)} and {tuple(keys.shape)}; pass one token and a cache's storage"
        )
    return qkv.new_empty((qkv.shape[0], 1, qkv.shape[2] - 2 * keys.shape[1] * keys.shape[3]))


def decode_attention_reference(
    qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, length: int, scale: float
) -> Tensor:
    """:func:`decode_attention` in plain torch: the embedding in the dtype of qkv, the rest in float64.

    Keys and values are written into the storage, with the bits of the operator.

    Returns:
        float64 [batch, 1, heads * head_dim].
    """
    batch, kv_heads, _, dim = keys.shape
    tokens = qkv.view(batch, -1, dim)
    heads = tokens.shape[1] - 2 * kv_heads
    rotating = tokens[:, : heads + kv_heads]
    first, second = rotating.chunk(2, -1)
    rotating = rotating * cos + torch.cat((-second, first), -1) * sin
    keys[:, :, length] = rotating[:, heads:]
    values[:, :, length] = tokens[:, heads + kv_heads :]
    query = rotating[:, :heads].double().view(batch, kv_heads, heads // kv_heads, dim)
    held, content = (x[:, :, : length + 1].double() for x in (keys, values))
    weights = torch.softmax(query @ held.transpose(-1, -2) * scale, -1)
    return (weights @ content).view(batch, 1, heads * dim)
