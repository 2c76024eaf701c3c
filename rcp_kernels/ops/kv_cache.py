"""The 4-bit key-value cache: appending to it, reading it, and attention on it (docs/kv_cache.md)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import check_clip, check_float, check_tensor

__all__ = [
    "KVStorage",
    "empty_kv_cache",
    "fake_quantize_kv",
    "kv_cache_append",
    "kv_cache_append_reference",
    "kv_cache_attention",
    "kv_cache_attention_reference",
    "kv_cache_dequantize",
    "kv_cache_dequantize_reference",
]


class KVStorage(NamedTuple):
    """The packed keys and values of one layer: codes and scales of :func:`empty_kv_cache` for each."""

    key_codes: Tensor
    key_scales: Tensor
    value_codes: Tensor
    value_scales: Tensor


def empty_kv_cache(
    batch: int, kv_heads: int, capacity: int, head_dim: int, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Storage for the keys, or the values, of one layer. It is zero, and every position reads as 0.

    Returns:
        codes, uint8 [batch, kv_heads, capacity, ceil(head_dim / 2)], even entries in the low nibble; and scales,
        float16 [batch, kv_heads, capacity, 2]: scale and zero-point of each vector.
    """
    codes = torch.zeros(batch, kv_heads, capacity, (head_dim + 1) // 2, dtype=torch.uint8, device=device)
    return codes, torch.zeros(batch, kv_heads, capacity, 2, dtype=torch.float16, device=device)


def kv_cache_append(
    x: Tensor, codes: Tensor, scales: Tensor, position: int, clip: float = 1.0, held: Tensor | None = None
) -> None:
    """Quantize keys or values to 4 bits and write them into the storage, from ``position`` on.

    Each vector of head_dim entries has its own scale and zero-point, as :func:`fake_quantize_kv` says. Not
    differentiable.

    Args:
        x: float32, float16 or bfloat16 [batch, kv_heads, tokens, head_dim], any strides.
        codes, scales: contiguous, of :func:`empty_kv_cache`; written in place.
        position: of the first token, counted from ``held`` if that is given.
        clip: in (0, 1].
        held: int64 without dimensions, on the device of x. With it a captured call appends to other positions when
            the number in this tensor has changed.

    Raises:
        ValueError: shapes that do not match, no room, another dtype or clip. On the CPU also NaN, Inf or more than
            65504 in x; the written positions are then undefined. On CUDA such a vector reads as NaN. With ``held``,
            CUDA does not raise for a lack of room: it writes nothing, and attention then gives NaN.
    """
    torch.ops.rcp_kernels.kv_cache_append.default(x, codes, scales, position, clip, held)
    # torch's stable ABI cannot tell autograd that they have changed.
    if not (torch.compiler.is_compiling() or codes.is_inference() or scales.is_inference()):
        torch.autograd.graph.increment_version((codes, scales))


def kv_cache_dequantize(
    codes: Tensor, scales: Tensor, length: int, head_dim: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The first ``length`` positions of a cache as float [batch, kv_heads, length, head_dim].

    Each entry is scale * code + zero-point, rounded once to float32 and once to dtype.

    Raises:
        ValueError: shapes that do not match, a length beyond the capacity, or a dtype that is not float32, float16 or
            bfloat16.
    """
    out = torch.empty(*codes.shape[:2], length, head_dim, dtype=dtype, device=codes.device)
    torch.ops.rcp_kernels.kv_cache_dequantize.default(codes, scales, out)
    return out


def kv_cache_attention(
    query: Tensor,
    storage: KVStorage,
    length: int,
    scale: float | None = None,
    causal: bool = True,
    window: int = 0,
    mask: Tensor | None = None,
    held: Tensor | None = None,
) -> Tensor:
    """Attention of one or a few query tokens on a packed cache, which is read once and never dequantized to memory.

    ``softmax(scale * query @ keys.T) @ values`` for the first ``length`` positions. Groups of query heads may share a
    key-value head (GQA). Sums and softmax are float32 in a fixed order: two runs, any number of threads and any
    instruction set give the same bits. A query that sees no position gives 0. Not differentiable.

    Args:
        query: float32, float16 or bfloat16 [batch, heads, queries, head_dim], any strides; heads a multiple of
            kv_heads.
        storage: of the layer, contiguous.
        length: positions appended so far, counted from ``held`` if that is given. With causal or a window, the last
            query is at the last position.
        scale: of the scores; None is head_dim**-0.5.
        causal: each query sees its own position and those before it.
        window: each query sees only this many positions, its own the last; 0 for all.
        mask: bool [batch or 1, heads or 1, queries, length], True for positions that a query sees. It hides more
            positions; it does not show those that causal and window hide. With ``held`` it has the capacity in place
            of length.
        held: int64 without dimensions, on the device of query. The launch is then the same for every length. On CUDA
            the result may differ by rounding from that without ``held``, as the work is split by the capacity.

    Returns:
        As query in shape and dtype.

    Raises:
        ValueError: shapes that do not match, a length beyond the capacity, more queries than positions, or another
            dtype. On the CPU also NaN or Inf in query. With ``held``, CUDA gives NaN for a length beyond the capacity.
    """
    if scale is None:
        scale = query.shape[-1] ** -0.5
    return torch.ops.rcp_kernels.kv_cache_attention.default(query, *storage, length, scale, causal, window, mask, held)


def fake_quantize_kv(x: Tensor, bits: int = 4, clip: float = 1.0) -> Tensor:
    """x as the cache returns it: each vector along the last dimension quantized asymmetrically, then dequantized.

    The range [lo, hi] of a vector holds its entries times clip, and 0. Scale and zero-point are rounded to float16
    before use, as the cache stores them (docs/kv_cache.md has every step). QuaRot (Ashkboos et al. 2024) uses the same
    asymmetric quantizer for keys and values, but its zero-point is an integer; here it is the float16 value of lo. For
    training and evaluation: plain torch, no check for NaN, and the gradient is that of the identity.

    Args:
        x: float32, float16 or bfloat16 [..., head_dim].
        bits: 2 to 8; the cache stores 4.
        clip: in (0, 1]; 0.95 clips the largest entries and makes the steps finer.

    Returns:
        As x in shape and dtype.

    Raises:
        ValueError: another dtype, bits or clip.
    """
    check_float("fake_quantize_kv", "x", x)
    if not 2 <= bits <= 8:
        raise ValueError(f"fake_quantize_kv: bits must be 2 to 8, got {bits}; leave out the call for more")
    check_clip("fake_quantize_kv", clip)
    return _FakeQuantizeKV.apply(x, bits, clip)


class _FakeQuantizeKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor, bits: int, clip: float) -> Tensor:
        q, scale, zero = _quantize(x, bits, clip)
        return (q * scale + zero).to(x.dtype)

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0], None, None


def _quantize(x: Tensor, bits: int, clip: float) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [..., n], scale and zero-point [..., 1], all float32; the last two are rounded to float16."""
    values = x.detach().to(torch.float32)
    if x.shape[-1] == 0:
        empty = values.new_zeros((*x.shape[:-1], 1))
        return values, empty, empty
    # The scalars are float32 tensors: every step rounds once to float32, as in the kernels.
    ratio = values.new_tensor(clip)
    low, high = torch.aminmax(values, dim=-1, keepdim=True)
    zero = (low.clamp(max=0) * ratio).to(torch.float16).to(torch.float32)
    span = high.clamp(min=0) * ratio - zero
    scale = (span / values.new_tensor(2**bits - 1.0)).to(torch.float16).to(torch.float32)
    inverse = torch.where(scale == 0, 0.0, 1.0 / scale)
    q = torch.round((values - zero) * inverse).clamp(0, 2**bits - 1)
    return q, scale, zero


def check_storage(op: str, prefix: str, codes: Tensor, scales: Tensor, head_dim: int) -> None:
    width = (head_dim + 1) // 2
    if codes.dim() != 4 or codes.dtype != torch.uint8 or codes.shape[3] != width:
        raise ValueError(
            f"{op}: {prefix}codes must be uint8 [batch, kv_heads, capacity, {width}] for head_dim {head_dim}, got "
            f"{codes.dtype} {tuple(codes.shape)}; allocate it with empty_kv_cache"
        )
    shape = (*codes.shape[:3], 2)
    check_tensor(op, f"{prefix}scales", scales, torch.float16, shape, "allocate it with empty_kv_cache")


def _check_four(op: str, name: str, x: Tensor) -> None:
    check_float(op, name, x)
    if x.dim() != 4 or x.shape[3] < 1:
        raise ValueError(f"{op}: {name} must have four dimensions, got shape {tuple(x.shape)}; reshape it")


def _check_held(op: str, held: Tensor, device: torch.device) -> None:
    if held.dtype != torch.int64 or held.dim() != 0 or held.device != device:
        raise ValueError(
            f"{op}: held must be int64 without dimensions on {device}, got {held.dtype} {tuple(held.shape)} on "
            f"{held.device}; use torch.tensor(0, device=...)"
        )


def check_append(
    x: Tensor, codes: Tensor, scales: Tensor, position: int, clip: float, held: Tensor | None = None
) -> None:
    """Check the arguments of kv_cache_append. With ``held`` the room is not checked, as that needs its number."""
    op = "kv_cache_append"
    _check_four(op, "x", x)
    check_clip(op, clip)
    check_storage(op, "", codes, scales, x.shape[3])
    if x.shape[:2] != codes.shape[:2]:
        raise ValueError(
            f"{op}: x must have the batch and kv_heads of codes, {tuple(codes.shape[:2])}, got shape {tuple(x.shape)}; "
            f"append to the cache of the same layer and batch"
        )
    if held is not None:
        _check_held(op, held, x.device)
    elif position < 0 or position + x.shape[2] > codes.shape[2]:
        raise ValueError(
            f"{op}: position + tokens must be {x.shape[2]} to {codes.shape[2]}, got {position + x.shape[2]}; position "
            f"must not be negative, and a full cache must be allocated with a larger capacity"
        )


def check_attention(
    query: Tensor,
    key_codes: Tensor,
    key_scales: Tensor,
    value_codes: Tensor,
    value_scales: Tensor,
    length: int,
    held: Tensor | None = None,
) -> None:
    """Check the arguments of kv_cache_attention. With ``held`` the length is not checked, as that needs its number."""
    op = "kv_cache_attention"
    _check_four(op, "query", query)
    check_storage(op, "key_", key_codes, key_scales, query.shape[3])
    check_storage(op, "value_", value_codes, value_scales, query.shape[3])
    if query.shape[0] != key_codes.shape[0] or query.shape[1] % key_codes.shape[1]:
        raise ValueError(
            f"{op}: query must have the batch of the cache and a multiple of its heads, {tuple(key_codes.shape)}, got "
            f"shape {tuple(query.shape)}; pass the cache of the same layer"
        )
    if held is not None:
        _check_held(op, held, query.device)
    elif not 0 <= length <= key_codes.shape[2]:
        raise ValueError(
            f"{op}: length must be 0 to {key_codes.shape[2]}, got {length}; pass the number of positions appended so "
            f"far"
        )


@torch.library.register_fake("rcp_kernels::kv_cache_append")
def _fake_append(*arguments: Any, **keywords: Any) -> None:
    pass


@torch.library.register_fake("rcp_kernels::kv_cache_dequantize")
def _fake_dequantize(codes: Tensor, scales: Tensor, out: Tensor) -> None:
    pass


@torch.library.register_fake("rcp_kernels::kv_cache_attention")
def _fake_attention(query: Tensor, *rest: Any, **keywords: Any) -> Tensor:
    return query.new_empty(query.shape)


def kv_cache_append_reference(
    x: Tensor, codes: Tensor, scales: Tensor, position: int, clip: float = 1.0, held: Tensor | None = None
) -> None:
    """:func:`kv_cache_append` in plain torch: the same float32 steps, and so the same bits.

    Raises:
        ValueError: as the operator does on the CPU, on every device.
    """
    if held is not None:
        _check_held("kv_cache_append", held, x.device)
        position += int(held)
    check_append(x, codes, scales, position, clip)
    q, scale, zero = _quantize(x, 4, clip)
    if not bool((torch.isfinite(x) & torch.isfinite(scale) & torch.isfinite(zero)).all()) or bool(
        (x.float().abs() * clip >= 65520).any()
    ):
        raise ValueError(
            "kv_cache_append: x must be finite and within float16's range, got NaN, Inf or more than 65504; find its "
            "source"
        )
    q = torch.nn.functional.pad(q.to(torch.uint8), (0, x.shape[3] % 2))
    tokens = slice(position, position + x.shape[2])
    codes[:, :, tokens] = q[..., ::2] | (q[..., 1::2] << 4)
    scales[:, :, tokens] = torch.cat([scale, zero], dim=-1).to(torch.float16)


def kv_cache_dequantize_reference(
    codes: Tensor, scales: Tensor, length: int, head_dim: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """:func:`kv_cache_dequantize` in plain torch, equal bit for bit; dtype may also be float64."""
    check_storage("kv_cache_dequantize", "", codes, scales, head_dim)
    packed = codes[:, :, :length]
    q = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)[..., :head_dim]
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    scale, zero = scales[:, :, :length].to(exact).split(1, dim=-1)
    # The product has 15 bits and is exact.
    return (q * scale + zero).to(dtype)


def kv_cache_attention_reference(
    query: Tensor,
    storage: KVStorage,
    length: int,
    scale: float | None = None,
    causal: bool = True,
    window: int = 0,
    mask: Tensor | None = None,
    held: Tensor | None = None,
) -> Tensor:
    """:func:`kv_cache_attention` in float64; returns float64 [batch, heads, queries, head_dim]."""
    if held is not None:
        _check_held("kv_cache_attention", held, query.device)
        length += int(held)
        mask = None if mask is None else mask[..., :length]
    check_attention(query, *storage, length)
    head_dim, groups = query.shape[3], query.shape[1] // storage[0].shape[1]
    keys, values = (
        kv_cache_dequantize_reference(codes, scales, length, head_dim, torch.float64).repeat_interleave(groups, dim=1)
        for codes, scales in (storage[:2], storage[2:])
    )
    scores = query.double() @ keys.mT * (head_dim**-0.5 if scale is None else scale)
    at = torch.arange(length, device=query.device)
    own = torch.arange(length - query.shape[2], length, device=query.device)[:, None]
    allowed = torch.ones(query.shape[2], length, dtype=torch.bool, device=query.device)
    if causal:
        allowed = allowed & (at <= own)
    if window > 0:
        allowed = allowed & (at > own - window)
    if mask is not None:
        allowed = allowed & mask
    scores = scores.masked_fill(~allowed, float("-inf"))
    return torch.softmax(scores, dim=-1).nan_to_num(0.0) @ values
