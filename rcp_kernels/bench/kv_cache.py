"""Decode attention on the 4-bit cache against torch on float caches and a plain read of memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import hardware, ops
from . import peers, timing
from .driver import Benchmark, Maker, Peer, WrongResult, dtype_name, without_threads
from .timing import CUDA

OURS = "kv_cache_attention"
READ = "plain read"
COPY = "device copy"
SDPA_FP32, SDPA_BF16, SDPA_FP16 = "sdpa fp32", "sdpa bf16", "sdpa fp16"
DEQUANTIZE = "dequantize + sdpa"

_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 6e-2}


@dataclass(frozen=True, kw_only=True)
class KVCache(Benchmark):
    """One query token of one sequence.

    Attributes:
        attentions: (heads, kv_heads, head_dim).
        contexts: positions in the cache.
    """

    dtype: torch.dtype = torch.float32
    # SmolLM2-135M, LLaMA-3-8B and LLaMA-2-7B.
    attentions: tuple[tuple[int, int, int], ...] = ((9, 3, 64), (32, 8, 128), (32, 32, 128))
    contexts: tuple[int, ...] = (512, 2048, 8192)

    op = OURS
    variants = (OURS,)
    shape = ("heads", "kv_heads", "head_dim", "context")
    titles: ClassVar = {
        "threads": "threads", "heads": "heads", "kv_heads": " kv", "head_dim": "head_dim", "context": "context",
    }  # fmt: skip
    groups: ClassVar[tuple[str, ...]] = ("threads", "context")
    axis = "context"
    bytes_column = "cache_bytes"
    roof = READ
    peers: ClassVar[tuple[str, ...]] = (SDPA_FP32, SDPA_BF16, DEQUANTIZE)

    @property
    def stem(self) -> str:
        where = hardware.cpu_isa() if self.device.type == "cpu" else self.device.type
        return f"kv_cache_{dtype_name(self.dtype)}_{where}"

    @property
    def subject(self) -> str:
        return f"attention of one {dtype_name(self.dtype)} query token on a 4-bit cache, batch 1"

    def comments(self) -> list[str]:
        return [
            f"each competitor rotates through {timing.rotated_bytes() >> 20} MB of caches",
            f"{DEQUANTIZE}: the cost of any other attention on the packed cache, in {dtype_name(self.dtype)}",
        ]

    def constants(self) -> dict[str, Any]:
        return {"dtype": dtype_name(self.dtype)}

    def shapes(self) -> Sequence[tuple[int, ...]]:
        return [(*attention, context) for attention in self.attentions for context in self.contexts]

    def competitors(self) -> dict[str, Maker]:
        return {
            OURS: self.ours,
            READ: lambda *shape: peers.memory_read(),
            SDPA_FP32: partial(peers.sdpa, torch.float32),
            SDPA_BF16: partial(peers.sdpa, torch.bfloat16),
            DEQUANTIZE: self.dequantize_and_attend,
        }

    def ours(self, heads: int, kv_heads: int, head_dim: int, context: int) -> Peer:
        """kv_cache_attention.

        Raises:
            WrongResult: it differs from its reference.
        """
        caches = self._caches(kv_heads, head_dim, context)
        query = torch.randn(1, heads, 1, head_dim, device=self.device).to(self.dtype)
        found, expected = (
            attention(query, caches[0], context).double()
            for attention in (ops.kv_cache_attention, ops.reference.kv_cache_attention)
        )
        error = (found - expected).abs().max().item()
        if not error <= _TOLERANCE[self.dtype]:
            raise WrongResult(f"{OURS} is off by {error:.2g} at {heads} heads, head_dim {head_dim}, context {context}")
        nbytes = sum(tensor.nbytes for tensor in caches[0])

        def call(i: int) -> Tensor:
            return ops.kv_cache_attention(query, caches[i % len(caches)], context)

        return Peer(lambda _: call, nbytes, len(caches))

    def dequantize_and_attend(self, heads: int, kv_heads: int, head_dim: int, context: int) -> Peer:
        """Dequantize the packed cache, then torch's attention."""
        caches = self._caches(kv_heads, head_dim, context)
        query = torch.randn(1, kv_heads, heads // kv_heads, head_dim, device=self.device).to(self.dtype)

        def call(i: int) -> Tensor:
            key_codes, key_scales, value_codes, value_scales = caches[i % len(caches)]
            keys = ops.kv_cache_dequantize(key_codes, key_scales, context, head_dim, self.dtype)
            values = ops.kv_cache_dequantize(value_codes, value_scales, context, head_dim, self.dtype)
            return F.scaled_dot_product_attention(query, keys, values)

        return Peer(lambda _: call, copies=len(caches))

    def _caches(self, kv_heads: int, head_dim: int, context: int) -> list[ops.KVStorage]:
        x = torch.randn(2, 1, kv_heads, context, head_dim, device=self.device)
        keys, values = (ops.empty_kv_cache(1, kv_heads, context, head_dim, self.device) for _ in x)
        for tensor, (codes, scales) in zip(x, (keys, values), strict=True):
            ops.kv_cache_append(tensor, codes, scales, 0)
        storage = ops.KVStorage(*keys, *values)
        copies = timing.copies_needed(sum(tensor.nbytes for tensor in storage), self.device)
        return [ops.KVStorage(*(tensor.clone() for tensor in storage)) for _ in range(copies)]


@dataclass(frozen=True, kw_only=True)
class CudaKVCache(KVCache):
    """On another device: on a GPU as CUDA graphs over caches of four times L2."""

    device: torch.device = CUDA
    threads: tuple[int | None, ...] = (None,)
    dtype: torch.dtype = torch.float16

    titles: ClassVar = without_threads(KVCache.titles)
    groups = ("context",)
    roof = COPY
    peers = (SDPA_FP16, DEQUANTIZE)

    def comments(self) -> list[str]:
        return [timing.GRAPHS] if self.device.type == "cuda" else []

    def competitors(self) -> dict[str, Maker]:
        return {
            OURS: self.ours,
            COPY: self.copy,
            SDPA_FP16: partial(peers.sdpa, torch.float16, device=self.device),
            DEQUANTIZE: self.dequantize_and_attend,
        }

    def copy(self, heads: int, kv_heads: int, head_dim: int, context: int) -> Peer:
        """A copy of as many bytes as the packed cache has."""
        keys = ops.empty_kv_cache(1, kv_heads, context, head_dim, "meta")
        return peers.device_copy(2 * sum(tensor.nbytes for tensor in keys), self.device)
