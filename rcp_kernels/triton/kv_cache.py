"""The 4-bit key-value cache on NVIDIA GPUs: append, dequantize, and split attention on the packed cache.

**Append.** One program handles one vector. Its float32 steps are the CPU's, so both devices store the same bits. The
kernel cannot raise for NaN, Inf or values beyond float16. The scale or zero-point of such a vector is Inf or NaN, and
the vector reads as NaN.

**Attention** is split over positions (Flash-Decoding, Dao et al. 2023). A program takes one key-value head, some of the
query rows that share it, and a run of positions. It decodes one tile of positions at a time, and writes maximum, sum
and weighted values in float32. A second kernel joins the splits in ascending order. The number of splits depends on the
shape alone, so two runs give the same bits. They differ from the CPU's by rounding. Codes are 0 to 15, which
every operand type of a dot product holds exactly. The even and the odd codes of a byte are two products. Scale and
zero-point are applied to the results.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.kv_cache import check_append, check_attention, check_storage
from .kv_cache_tiles import POSITIONS, operand, pairs, splits_of, tile_config
from .runtime import INTERPRETED, has_tensor_cores, on_device_of

# mypy knows no types for the arguments of kernels.
# mypy: allow-untyped-defs, allow-incomplete-defs


# Triton compiles a kernel again for an argument of 1 or a multiple of 16. Numbers that grow with the text are excluded.
@triton.jit(do_not_specialize=["tokens", "position"])
def _append_kernel(
    x_ptr,
    codes_ptr,
    scales_ptr,
    held_ptr,
    heads,
    tokens,
    stride_batch,
    stride_head,
    stride_token,
    capacity,
    position,
    clip,
    HEAD_DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    HELD: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    vector, token = index // tokens, index % tokens
    x_ptr += vector // heads * stride_batch + vector % heads * stride_head + token * stride_token
    place = position.to(tl.int64) + token
    if HELD:
        place += tl.load(held_ptr)
    # The host does not know `held`. A full cache keeps its vectors, and attention on it then gives NaN.
    room = (place >= 0) & (place < capacity)
    at = vector * capacity + place
    pair = tl.arange(0, PAIRS)
    # Two loads, because one load and a split would move values between threads. The row is in L1.
    even = tl.load(x_ptr + 2 * pair, mask=2 * pair < HEAD_DIM, other=0.0).to(tl.float32)
    odd = tl.load(x_ptr + 2 * pair + 1, mask=2 * pair + 1 < HEAD_DIM, other=0.0).to(tl.float32)
    # NaN must come through: tl.min and tl.max drop it.
    wrong = tl.sum(even * 0.0 + odd * 0.0, axis=0)
    low = tl.minimum(tl.min(tl.minimum(even, odd), axis=0), 0.0) * clip + wrong
    high = tl.maximum(tl.max(tl.maximum(even, odd), axis=0), 0.0) * clip + wrong
    stored_zero = low.to(tl.float16)
    zero = stored_zero.to(tl.float32)
    # Beyond float16 the scale is Inf, and so is the zero-point. No code can store such a value.
    span = tl.where(high >= 65520.0, float("inf"), high - zero)
    stored_scale = tl.div_rn(span, 15.0).to(tl.float16)
    scale = stored_scale.to(tl.float32)
    inverse = tl.where(scale > 0.0, tl.div_rn(1.0, scale), 0.0)
    code_even = _round(tl.minimum(tl.maximum((even - zero) * inverse, 0.0), 15.0))
    code_odd = _round(tl.minimum(tl.maximum((odd - zero) * inverse, 0.0), 15.0))
    code_odd = tl.where(2 * pair + 1 < HEAD_DIM, code_odd, 0.0)
    BYTES: tl.constexpr = (HEAD_DIM + 1) // 2
    packed = code_even.to(tl.int32) | (code_odd.to(tl.int32) << 4)
    tl.store(codes_ptr + at * BYTES + pair, packed.to(tl.uint8), mask=(pair < BYTES) & room)
    tl.store(scales_ptr + at * 2, stored_scale, mask=room)
    tl.store(scales_ptr + at * 2 + 1, stored_zero, mask=room)


@triton.jit
def _round(x):
    # Half to even for 0 <= x <= 15, where float32 has steps of 1 above 2^23.
    return (x + 8388608.0) - 8388608.0


@triton.jit(do_not_specialize=["length"])
def _dequantize_kernel(codes_ptr, scales_ptr, out_ptr, length, capacity, HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr):
    index = tl.program_id(0).to(tl.int64)
    at = index // length * capacity + index % length
    BYTES: tl.constexpr = (HEAD_DIM + 1) // 2
    pair = tl.arange(0, PAIRS)
    packed = tl.load(codes_ptr + at * BYTES + pair, mask=pair < BYTES, other=0)
    scale = tl.load(scales_ptr + at * 2).to(tl.float32)
    zero = tl.load(scales_ptr + at * 2 + 1).to(tl.float32)
    even = (packed & 15).to(tl.float32) * scale + zero
    odd = (packed >> 4).to(tl.float32) * scale + zero
    out_ptr += index * HEAD_DIM
    tl.store(out_ptr + 2 * pair, even.to(out_ptr.dtype.element_ty), mask=2 * pair < HEAD_DIM)
    tl.store(out_ptr + 2 * pair + 1, odd.to(out_ptr.dtype.element_ty), mask=2 * pair + 1 < HEAD_DIM)


@triton.jit
def _query_part(row_ptr, here, part, HEAD_DIM: tl.constexpr, PART: tl.constexpr):
    """Even and odd entries of the query rows, [rows, PART] each, from pair `part` on; 0 where there are none."""
    k = 2 * (part + tl.arange(0, PART))
    even = tl.load(row_ptr + k[None, :], mask=here[:, None] & (k < HEAD_DIM)[None, :], other=0.0)
    odd = tl.load(row_ptr + k[None, :] + 1, mask=here[:, None] & (k + 1 < HEAD_DIM)[None, :], other=0.0)
    return even, odd


# More than 60 lines: a Triton kernel keeps its state in local variables, which a helper would need all of.
@triton.jit(do_not_specialize=["rows", "queries", "length", "split_size", "mask_batch", "mask_head", "mask_query"])
def _attention_kernel(
    query_ptr,
    key_codes_ptr,
    key_scales_ptr,
    value_codes_ptr,
    value_scales_ptr,
    mask_ptr,
    held_ptr,
    partial_ptr,
    rows,
    queries,
    kv_heads,
    groups,
    capacity,
    length,
    split_size,
    scale,
    window,
    mask_batch,
    mask_head,
    mask_query,
    HEAD_DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    POSITIONS: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    MASK: tl.constexpr,
    HELD: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """partial [kv heads of all batches, splits, rows, 2 * PAIRS + 2]: values of even and odd k, maximum, sum."""
    head = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    BYTES: tl.constexpr = (HEAD_DIM + 1) // 2
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    pair = tl.arange(0, PAIRS)
    query_ptr += (head * rows + row[:, None]) * HEAD_DIM
    here = row < rows
    total = tl.zeros((ROWS,), tl.float32)
    for part in tl.static_range(0, PAIRS, PART):
        even, odd = _query_part(query_ptr, here, part, HEAD_DIM, PART)
        total += tl.sum(even.to(tl.float32) + odd.to(tl.float32), axis=1)
    if HELD:
        length += tl.load(held_ptr).to(tl.int32)
    own = length - queries + row % queries
    mask_row = head // kv_heads * mask_batch + (head % kv_heads * groups + row // queries) * mask_head
    mask_row += row % queries * mask_query

    maximum = tl.full((ROWS,), float("-inf"), tl.float32)
    weights = tl.zeros((ROWS,), tl.float32)
    offset = tl.zeros((ROWS,), tl.float32)
    value_even = tl.zeros((ROWS, PAIRS), tl.float32)
    value_odd = tl.zeros((ROWS, PAIRS), tl.float32)
    begin = split * split_size
    if WINDOW:
        begin += tl.maximum(0, length - queries - window + 1) // BLOCK * BLOCK
    if HELD:
        # The host does not know whether the last append had room. NaN shows that it had none.
        offset = tl.where((length > capacity) & here, float("nan"), 0.0)
    end = tl.minimum(begin + split_size, tl.minimum(length, capacity))
    for start in range(begin, end, POSITIONS):
        at = start + tl.arange(0, POSITIONS)
        inside = at < end
        place = head * capacity + at
        dot = tl.zeros((ROWS, POSITIONS), tl.float32)
        for part in tl.static_range(0, PAIRS, PART):
            # In registers where they are one part, in L1 where they are several.
            if PART < PAIRS:
                even, odd = _query_part(query_ptr, here, part, HEAD_DIM, PART)
            # Nibbles are loaded transposed: [PART, POSITIONS].
            byte = part + tl.arange(0, PART)
            codes = tl.load(
                key_codes_ptr + place[None, :] * BYTES + byte[:, None],
                mask=inside[None, :] & (byte < BYTES)[:, None],
                other=0,
            )
            dot = tl.dot(even.to(OPERAND), (codes & 15).to(OPERAND), dot, input_precision="ieee")
            dot = tl.dot(odd.to(OPERAND), (codes >> 4).to(OPERAND), dot, input_precision="ieee")
        key_scale = tl.load(key_scales_ptr + 2 * place, mask=inside, other=0.0).to(tl.float32)
        key_zero = tl.load(key_scales_ptr + 2 * place + 1, mask=inside, other=0.0).to(tl.float32)
        score = (key_scale[None, :] * dot + key_zero[None, :] * total[:, None]) * scale
        allowed = inside[None, :] & here[:, None]
        if CAUSAL:
            allowed = allowed & (at[None, :] <= own[:, None])
        if WINDOW:
            allowed = allowed & (at[None, :] > own[:, None] - window)
        if MASK:
            seen = tl.load(mask_ptr + mask_row[:, None] + at[None, :], mask=allowed, other=0)
            allowed = allowed & (seen != 0)
        score = tl.where(allowed, score, float("-inf"))
        higher = tl.maximum(maximum, tl.max(score, axis=1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp2(maximum - shift)
        p = tl.exp2(score - shift[:, None])
        maximum = higher
        weights = weights * shrink + tl.sum(p, axis=1)
        value_scale = tl.load(value_scales_ptr + 2 * place, mask=inside, other=0.0).to(tl.float32)
        value_zero = tl.load(value_scales_ptr + 2 * place + 1, mask=inside, other=0.0).to(tl.float32)
        offset = offset * shrink + tl.sum(p * value_zero[None, :], axis=1)
        codes = tl.load(
            value_codes_ptr + place[:, None] * BYTES + pair[None, :],
            mask=inside[:, None] & (pair < BYTES)[None, :],
            other=0,
        )
        weighted = (p * value_scale[None, :]).to(OPERAND)
        value_even = value_even * shrink[:, None]
        value_odd = value_odd * shrink[:, None]
        value_even = tl.dot(weighted, (codes & 15).to(OPERAND), value_even, input_precision="ieee")
        value_odd = tl.dot(weighted, (codes >> 4).to(OPERAND), value_odd, input_precision="ieee")

    WIDTH: tl.constexpr = 2 * PAIRS + 2
    partial_ptr += ((head * tl.num_programs(1) + split) * rows + row) * WIDTH
    tl.store(partial_ptr[:, None] + pair[None, :], value_even + offset[:, None], mask=here[:, None])
    tl.store(partial_ptr[:, None] + PAIRS + pair[None, :], value_odd + offset[:, None], mask=here[:, None])
    tl.store(partial_ptr + 2 * PAIRS, maximum, mask=here)
    tl.store(partial_ptr + 2 * PAIRS + 1, weights, mask=here)


@triton.jit(do_not_specialize=["rows", "splits"])
def _join_kernel(partial_ptr, out_ptr, rows, splits, HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr):
    index = tl.program_id(0).to(tl.int64)
    WIDTH: tl.constexpr = 2 * PAIRS + 2
    pair = tl.arange(0, PAIRS)
    partial_ptr += (index // rows * splits * rows + index % rows) * WIDTH
    maximum = tl.full((), float("-inf"), tl.float32)
    for split in range(splits):
        maximum = tl.maximum(maximum, tl.load(partial_ptr + split * rows * WIDTH + 2 * PAIRS))
    shift = tl.where(maximum == float("-inf"), 0.0, maximum)
    total = tl.zeros((), tl.float32)
    even = tl.zeros((PAIRS,), tl.float32)
    odd = tl.zeros((PAIRS,), tl.float32)
    for split in range(splits):
        at = partial_ptr + split * rows * WIDTH
        weight = tl.exp2(tl.load(at + 2 * PAIRS) - shift)
        total += weight * tl.load(at + 2 * PAIRS + 1)
        even += weight * tl.load(at + pair)
        odd += weight * tl.load(at + PAIRS + pair)
    total = tl.where(total == 0.0, 1.0, total)
    out_ptr += index * HEAD_DIM
    tl.store(out_ptr + 2 * pair, (even / total).to(out_ptr.dtype.element_ty), mask=2 * pair < HEAD_DIM)
    tl.store(out_ptr + 2 * pair + 1, (odd / total).to(out_ptr.dtype.element_ty), mask=2 * pair + 1 < HEAD_DIM)


def kv_cache_append(
    x: Tensor, codes: Tensor, scales: Tensor, position: int, clip: float = 1.0, held: Tensor | None = None
) -> None:
    check_append(x, codes, scales, position, clip, held)
    _check_contiguous("kv_cache_append", codes, scales)
    batch, heads, tokens, head_dim = x.shape
    if x.numel() == 0:
        return
    if x.stride(3) != 1:
        x = x.contiguous()
    strides = (x.stride(0), x.stride(1), x.stride(2))
    with on_device_of(x):
        _append_kernel[(batch * heads * tokens,)](
            x, codes, scales, codes if held is None else held, heads, tokens, *strides, codes.shape[2], position, clip,
            head_dim, pairs(head_dim), held is not None, num_warps=1,
        )  # fmt: skip


def kv_cache_dequantize(codes: Tensor, scales: Tensor, out: Tensor) -> None:
    check_storage("kv_cache_dequantize", "", codes, scales, out.shape[3])
    _check_contiguous("kv_cache_dequantize", codes, scales, out)
    batch, heads, length, head_dim = out.shape
    if out.shape[:2] != codes.shape[:2] or length > codes.shape[2]:
        raise ValueError(
            f"kv_cache_dequantize: out must be {tuple(codes.shape[:2])} heads of at most {codes.shape[2]} positions, "
            f"got shape {tuple(out.shape)}; read what the cache holds"
        )
    if out.numel() == 0:
        return
    with on_device_of(out):
        _dequantize_kernel[(batch * heads * length,)](
            codes, scales, out, length, codes.shape[2], head_dim, pairs(head_dim), num_warps=1
        )


def kv_cache_attention(
    query: Tensor,
    key_codes: Tensor,
    key_scales: Tensor,
    value_codes: Tensor,
    value_scales: Tensor,
    length: int,
    scale: float,
    causal: bool = True,
    window: int = 0,
    mask: Tensor | None = None,
    held: Tensor | None = None,
) -> Tensor:
    check_attention(query, key_codes, key_scales, value_codes, value_scales, length, held)
    _check_contiguous("kv_cache_attention", key_codes, key_scales, value_codes, value_scales)
    batch, heads, queries, head_dim = query.shape
    kv_heads, capacity = key_codes.shape[1:3]
    query = query.contiguous()
    out = torch.empty_like(query)
    if query.numel() == 0:
        return out
    # With `held` the launch is the same for every length: it covers the capacity.
    positions = length if held is None else capacity
    if positions == 0:
        return out.zero_()
    groups, rows = heads // kv_heads, heads // kv_heads * queries
    if window > 0:
        # The kernel starts at a multiple of POSITIONS.
        reach = min(positions, window + queries - 1 + POSITIONS - 1)
        first = max(0, length - queries - window + 1) // POSITIONS * POSITIONS
        positions = length - first if held is None else reach
    cores = has_tensor_cores(query.device)
    operand_type = operand(query.dtype, cores and not INTERPRETED)
    tile = tile_config(head_dim, operand_type, cores)
    row_tiles = -(-rows // tile.rows)
    splits, size = splits_of(batch * kv_heads * row_tiles, positions)
    width = 2 * pairs(head_dim) + 2
    partial = torch.empty(batch * kv_heads, splits, rows, width, dtype=torch.float32, device=query.device)
    mask_strides = (0, 0, 0)
    if mask is not None:
        mask = mask.expand(batch, heads, queries, length if held is None else capacity)
        if mask.stride(3) != 1:
            mask = mask.contiguous()
        mask_strides = (mask.stride(0), mask.stride(1), mask.stride(2))
        mask = mask.view(torch.uint8)
    with on_device_of(query):
        _attention_kernel[(batch * kv_heads, splits, row_tiles)](
            query, key_codes, key_scales, value_codes, value_scales, key_codes if mask is None else mask,
            key_codes if held is None else held, partial, rows, queries, kv_heads, groups, capacity, length, size,
            scale * 1.4426950408889634, window, *mask_strides, head_dim, pairs(head_dim), tile.part, tile.rows,
            tile.positions, causal, window > 0, mask is not None, held is not None, operand_type, POSITIONS,
            num_warps=tile.warps,
        )  # fmt: skip
        _join_kernel[(batch * heads * queries,)](partial, out, rows, splits, head_dim, pairs(head_dim), num_warps=1)
    return out


def _check_contiguous(op: str, *tensors: Tensor) -> None:
    if not all(tensor.is_contiguous() for tensor in tensors):
        raise ValueError(f"{op}: the cache must be contiguous, got other strides; pass it whole, with its length")
