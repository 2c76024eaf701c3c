"""Cases of every operator but the linear layer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from .. import ops
from ..ops.walsh_matrices import factor_size
from .cases import Case, Comparison, Skipped, bound_of_cast, exactly, name_of, noise, shape_text, within

__all__ = ["activation_cases", "cache_cases", "search_cases", "walsh_cases"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_EQUAL = "equal"


# Quantized activations.


def activation_cases() -> Iterator[Case]:
    """Tokens of one entry to a long row, of zeros, of no tokens and of no entries, clipped or not, packed or not."""
    shapes = ((1, 1), (3, 7), (5, 4096), (2, 3, 513), (512, 256), (0, 8), (4, 0))
    for (bits, packed), dtype, shape in itertools.product(((4, False), (4, True), (8, False)), DTYPES, shapes):
        name = f"{shape_text(shape)}, A{bits}, {name_of(dtype)}{', packed' if packed else ''}"
        run = partial(_activation, bits, packed, dtype, shape)
        yield Case("quantize_activation", f"A{bits}", name, _EQUAL, run)


def _activation(
    bits: int, packed: bool, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> Iterator[Comparison]:
    x = noise(*shape, dtype=dtype) * 3
    if x.numel():
        x.view(-1, shape[-1])[0] = 0
    for clip in (1.0, 0.9):
        found = ops.quantize_activation(x.to(device), bits, clip, packed)
        again = ops.quantize_activation(x.to(device), bits, clip, packed)
        expected = ops.reference.quantize_activation(x, bits, clip, packed)
        for what, *values in zip(("q", "scale"), found, expected, again, strict=True):
            yield exactly(f"{what} at clip {clip}", values[0], values[1])
            yield exactly(f"{what} of a second run", values[2], values[0])


# Walsh transforms.


def walsh_cases() -> Iterator[Case]:
    """Powers of two and m * 2^k, in blocks and whole, both orders and directions, in place and not."""
    # Each size, dtype and order is a Triton kernel that takes a second to compile: some sizes have one dtype.
    every, one = DTYPES, DTYPES[1:2]
    sizes = (
        *((64, None, every), (576, None, every), (4096, None, every), (1536, 96, every)),
        *((32, None, one), (256, None, one), (1536, None, one), (512, 64, one)),
    )
    for size, group, dtypes in sizes:
        for order, dtype, rows in itertools.product(("sequency", "natural"), dtypes, (1, 33)):
            name = f"{rows} x {size}{f' in blocks of {group}' if group else ''}, {order}, {name_of(dtype)}"
            run = partial(_walsh, rows, size, group, order, dtype)
            yield Case("walsh_transform", order, name, "float32 sums (docs/walsh.md), and the cast", run)
    for dtype, (bits, packed) in itertools.product(DTYPES, ((4, False), (4, True), (8, False))):
        for rows, size, group in ((1, 4096, 128), (5, 1536, None), (0, 64, None)):
            blocks = f" in blocks of {group}" if group else ""
            name = f"{rows} x {size}{blocks}, A{bits}, {name_of(dtype)}{', packed' if packed else ''}"
            run = partial(_walsh_quantize, rows, size, group, bits, packed, dtype)
            yield Case("walsh_quantize", f"A{bits}", name, "equal to the two steps", run)
    yield Case("walsh_transform", "empty", "0 x 64", _EQUAL, partial(_walsh, 0, 64, None, "sequency", torch.float32))


def _walsh(
    rows: int, size: int, group: int | None, order: str, dtype: torch.dtype, device: torch.device
) -> Iterator[Comparison]:
    x = noise(rows, size, dtype=dtype)
    block = group or size
    m, power = factor_size(block, "check")
    # Each result is a sum of `block` terms: log2 of the power additions deep, a product with the base, the scale.
    magnitude = x.double().abs().unflatten(-1, (-1, block)).sum(-1).repeat_interleave(block, -1) * block**-0.5
    bound = (math.log2(power) + (m + 2 if m > 1 else 2)) * 2.0**-24 * magnitude + 2.0**-126
    for inverse in (False, True):
        y = ops.walsh_transform(x.to(device), order, group, inverse=inverse)
        exact = ops.reference.walsh_transform(x, order, group, inverse=inverse)
        what = "the inverse" if inverse else "y"
        yield within(what, y, exact, bound_of_cast(exact, bound, dtype))
        yield exactly(f"{what} in place", ops.walsh_transform(x.to(device), order, group, None, inverse, True), y)


def _walsh_quantize(
    rows: int, size: int, group: int | None, bits: int, packed: bool, dtype: torch.dtype, device: torch.device
) -> Iterator[Comparison]:
    x = noise(rows, size, dtype=dtype).to(device)
    rotated = ops.walsh_transform(x, "sequency", group).cpu()
    expected = ops.reference.quantize_activation(rotated, bits, 1.0, packed)
    found = ops.walsh_quantize(x, bits, 1.0, packed, "sequency", group)
    for what, value, wanted in zip(("q", "scale"), found, expected, strict=True):
        yield exactly(what, value, wanted)


# The 4-bit cache, and attention.


def cache_cases() -> Iterator[Case]:
    """Appending, reading and attention at lengths around a chunk of 256 positions, with and without GQA."""
    for dtype, (heads, kv_heads, dim) in itertools.product(DTYPES, ((9, 3, 64), (8, 8, 128), (4, 1, 80))):
        layout = f"{heads} heads on {kv_heads} of {dim}"
        run = partial(_append, kv_heads, dim, dtype)
        yield Case("kv_cache_append", "KV4", f"{layout}, {name_of(dtype)}", _EQUAL, run)
        for length, queries in ((1, 1), (17, 1), (255, 1), (257, 4), (1000, 1), (600, 16)):
            name = f"{layout}, {length} positions, {queries} queries, {name_of(dtype)}"
            run = partial(_attention, heads, kv_heads, dim, length, queries, dtype)
            bound = "docs/kv_cache.md, and the cast" if dtype == torch.float32 else "docs/kv_cache.md"
            yield Case("kv_cache_attention", "KV4", name, bound, run)
    for dtype, length in itertools.product(DTYPES, (0, 100)):
        name = f"9 heads on 3 of 64, {length} earlier tokens, {name_of(dtype)}"
        run = partial(_decode_attention, length, dtype)
        yield Case("decode_attention", "float", name, "docs/numerics.md", run)


def _storage(kv_heads: int, dim: int, length: int, dtype: torch.dtype, device: torch.device) -> ops.KVStorage:
    """Keys and values of two sequences in a cache with free room, quantized by the reference."""
    tensors: list[Tensor] = []
    for seed in (1, 2):
        codes, scales = ops.empty_kv_cache(2, kv_heads, length + 3, dim)
        ops.reference.kv_cache_append(noise(2, kv_heads, length, dim, dtype=dtype, seed=seed), codes, scales, 0)
        tensors += [codes, scales]
    return ops.KVStorage(*(tensor.to(device) for tensor in tensors))


def _append(kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    expected, found, again = (ops.empty_kv_cache(2, kv_heads, 40, dim, where) for where in ("cpu", device, device))
    for position, tokens, clip in ((0, 1, 1.0), (1, 30, 0.95), (31, 9, 1.0)):
        x = noise(2, kv_heads, tokens, dim, dtype=dtype, seed=tokens)
        ops.reference.kv_cache_append(x, *expected, position, clip)
        ops.kv_cache_append(x.to(device), *found, position, clip)
        # The same position, counted from a number on the device.
        held = torch.tensor(position, device=device)
        ops.kv_cache_append(x.to(device), *again, 0, clip, held)
    for what, value, wanted, second in zip(("codes", "scales"), found, expected, again, strict=True):
        yield exactly(what, value, wanted)
        yield exactly(f"{what} of a second run, its position on the device", second, value)
    for target in DTYPES:
        read = ops.kv_cache_dequantize(*found, 40, dim, target)
        wanted = ops.reference.kv_cache_dequantize(*expected, 40, dim, target)
        yield exactly(f"kv_cache_dequantize to {name_of(target)}", read, wanted)


def _attention(
    heads: int, kv_heads: int, dim: int, length: int, queries: int, dtype: torch.dtype, device: torch.device
) -> Iterator[Comparison]:
    storage = _storage(kv_heads, dim, length, dtype, torch.device("cpu"))
    moved = ops.KVStorage(*(tensor.to(device) for tensor in storage))
    query = noise(2, heads, queries, dim, dtype=dtype, seed=3)
    for window in (0, 100):
        y = ops.kv_cache_attention(query.to(device), moved, length, window=window)
        exact = ops.reference.kv_cache_attention(query, storage, length, window=window)
        bound = _attention_bound(query, storage, length, exact)
        yield within(f"y in a window of {window or length}", y, exact, bound)
        held = torch.tensor(length, device=device)
        counted = ops.kv_cache_attention(query.to(device), moved, 0, window=window, held=held)
        yield within(f"y in a window of {window or length}, the length on the device", counted, exact, bound)
        again = ops.kv_cache_attention(query.to(device), moved, length, window=window)
        yield exactly("a second run", again, y)


def _attention_bound(query: Tensor, storage: ops.KVStorage, length: int, exact: Tensor) -> Tensor:
    """docs/kv_cache.md: float32 sums, and for 16-bit queries the tensor cores' products of that dtype."""
    dim = query.shape[-1]
    keys, values = (
        ops.reference.kv_cache_dequantize(codes, scales, length, dim, torch.float64)
        for codes, scales in (storage[:2], storage[2:])
    )
    largest = values.abs().max()
    size = query.double().abs().sum(-1).max() * dim**-0.5 * keys.abs().max()
    bound = (40 + 4 * size * (dim / 16 + 8)) * 2.0**-24 * largest + 1e-7
    bound = bound + {torch.float32: 0.0, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}[query.dtype] * largest
    return bound_of_cast(exact, bound, query.dtype)


def _decode_attention(length: int, dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    if device.type == "cuda":
        raise Skipped("decode_attention has no CUDA kernel")
    heads, kv_heads, dim = 9, 3, 64
    qkv = noise(2, 1, (heads + 2 * kv_heads) * dim, dtype=dtype)
    angle = noise(2, 1, dim, seed=2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    keys, values = (noise(2, kv_heads, length + 2, dim, dtype=dtype, seed=seed) for seed in (3, 4))
    moved_keys, moved_values = (tensor.to(device, copy=True) for tensor in (keys, values))
    exact = ops.reference.decode_attention(qkv, cos, sin, keys, values, length, dim**-0.5)
    x, cosine, sine = (tensor.to(device) for tensor in (qkv, cos, sin))
    y = ops.decode_attention(x, cosine, sine, moved_keys, moved_values, length, dim**-0.5)
    largest = values[:, :, : length + 1].double().abs().max()
    yield within("y", y, exact, bound_of_cast(exact, 1e-5 * largest, dtype))
    yield exactly("keys", moved_keys, keys)
    yield exactly("values", moved_values, values)


# Level searches. On devices other than the CPU the reference runs there.


def search_cases() -> Iterator[Case]:
    """Levels, ranges and codes of groups of odd lengths, with and without importance."""
    for groups, length, bits in ((1, 1, 2), (40, 32, 2), (33, 100, 3), (16, 513, 4), (64, 128, 4)):
        shape = f"{groups} groups of {length}, {2**bits} levels"
        for weighted in (False, True):
            name = f"{shape}{', with importance' if weighted else ''}"
            for op, run, bound in (
                ("kmeans_levels", _kmeans, "1e-5 of the largest weight"),
                ("clip_search", _clip, "the least error of the reference, to 1e-6 of it"),
            ):
                yield Case(op, f"{2**bits} levels", name, bound, partial(run, groups, length, bits, weighted))
        run_codes = partial(_nearest, groups, length, bits)
        yield Case("nearest_codes", f"{2**bits} levels", shape, _EQUAL, run_codes)
    for rows, columns, bits in ((1, 8, 2), (33, 32, 3), (64, 64, 4)):
        name = f"{rows} x {columns}, {2**bits} levels"
        yield Case("gptq_round", f"{2**bits} levels", name, _EQUAL, partial(_gptq, rows, columns, bits))


def _groups(groups: int, length: int, weighted: bool) -> tuple[Tensor, Tensor | None]:
    return noise(groups, length), noise(groups, length, seed=2).abs() if weighted else None


def _to(device: torch.device, tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


def _kmeans(groups: int, length: int, bits: int, weighted: bool, device: torch.device) -> Iterator[Comparison]:
    x, importance = _groups(groups, length, weighted)
    found = ops.kmeans_levels(x.to(device), 2**bits, _to(device, importance))
    expected = ops.reference.kmeans_levels(x, 2**bits, importance)
    yield within("levels", found, expected, 1e-5 * x.abs().max())
    yield exactly("a second run", ops.kmeans_levels(x.to(device), 2**bits, _to(device, importance)), found)


def _clip(groups: int, length: int, bits: int, weighted: bool, device: torch.device) -> Iterator[Comparison]:
    x, importance = _groups(groups, length, weighted)
    found = ops.clip_search(x.to(device), 2**bits, _to(device, importance))
    expected = ops.reference.clip_search(x, 2**bits, importance)
    # Two ranges may have nearly the same error, and a device may sum in another order: compare the errors.
    errors = [_range_error(x, ratios.cpu(), 2**bits, importance) for ratios in (found, expected)]
    yield within("squared error", errors[0], errors[1], 1e-6 * errors[1] + 1e-12)
    yield exactly("a second run", ops.clip_search(x.to(device), 2**bits, _to(device, importance)), found)


def _range_error(x: Tensor, ratios: Tensor, count: int, importance: Tensor | None) -> Tensor:
    """Squared error of each group between the ends that the ratios give, in float64."""
    wide = x.double()
    low = wide.amin(1, keepdim=True) * ratios[:, :1].double()
    step = (wide.amax(1, keepdim=True) * ratios[:, 1:].double() - low).clamp_(min=0) / (count - 1)
    codes = ((wide - low) / torch.where(step > 0, step, math.inf)).round().clamp(0, count - 1)
    error = (codes * step + low - wide).square()
    return (error if importance is None else error * importance).sum(1)


def _nearest(groups: int, length: int, bits: int, device: torch.device) -> Iterator[Comparison]:
    weight = noise(groups, 3 * length)
    table = noise(groups, 3, 2**bits, seed=2).sort(-1).values
    found = ops.nearest_codes(weight.to(device), table.to(device), length)
    yield exactly("codes", found, ops.reference.nearest_codes(weight, table, length))


def _gptq(rows: int, columns: int, bits: int, device: torch.device) -> Iterator[Comparison]:
    upper = torch.eye(columns) + 0.1 * noise(columns, columns).triu(1)
    table = noise(rows, 2**bits, seed=2).sort(-1).values
    block, expected_block = noise(rows, columns, seed=3).to(device), noise(rows, columns, seed=3)
    found = ops.gptq_round(block, upper.to(device), table.to(device), 0, columns // 2)
    expected = ops.reference.gptq_round(expected_block, upper, table, 0, columns // 2)
    for what, value, wanted in zip(("codes", "errors"), found, expected, strict=True):
        yield exactly(what, value, wanted)
    yield exactly("the corrected block", block, expected_block)
