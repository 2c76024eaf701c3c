"""Quantization of a transformed tile: largest magnitude, scale, packed or plain values."""

# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment, misc"

from __future__ import annotations

import triton
import triton.language as tl

from .dense_factor import output_place


@triton.jit
def largest_magnitude(y, TILE: tl.constexpr):
    """The largest magnitude in a tile, as the bits of a float32. They order as floats do, with Inf and NaN on top."""
    largest = y.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    # First inside a thread. For a reduction alone Triton would exchange the whole tile into another layout.
    VALUES: tl.constexpr = TILE.rows * TILE.padded_m * TILE.c
    for i in tl.static_range(TILE.vector.bit_length() - 1):
        even, odd = tl.split(tl.reshape(largest, (VALUES // 2 ** (i + 1), 2)))
        largest = tl.maximum(even, odd)
    return tl.max(largest)


@triton.jit
def scale_and_inverse(largest, clip, QMAX: tl.constexpr):
    """The token's scale and its inverse, by the steps of docs/numerics.md.

    The inverse is 0 for a token that vanishes or is not finite. The scale is 0 for the former and NaN for the latter.
    """
    finite = largest < 0x7F800000
    scale = tl.div_rn(largest.to(tl.float32, bitcast=True) * clip, QMAX * 1.0)
    usable = finite & (scale >= 7.52316384526264e-37)  # 2^-120
    inverse = tl.where(usable, tl.div_rn(1.0, tl.where(usable, scale, 1.0)), 0.0)
    return tl.where(usable, scale, tl.where(finite, 0.0, float("nan"))), inverse


@triton.jit
def store_quantized(
    y,
    inverse,
    q_ptr,
    start,
    permutation_ptr,
    rows,
    GROUPS: tl.constexpr,
    QMAX: tl.constexpr,
    PACKED: tl.constexpr,
    TILE: tl.constexpr,
):
    """Quantize y, the first rows of a token from `start` on, and store them."""
    # Selected to 0, not multiplied: the token may hold NaN or Inf.
    value = tl.where(inverse > 0.0, y.to(tl.float32) * inverse, 0.0)
    value = tl.minimum(tl.maximum(value, -QMAX - 1.0), QMAX * 1.0)
    # Rounds half to even, because 1.5 * 2^23 + value has no bits below the units.
    q = ((value + 12582912.0) - 12582912.0).to(tl.int8)
    if TILE.m == 1:
        # Rows are consecutive. A single row may be too short for a byte.
        WIDTH: tl.constexpr = TILE.rows * TILE.n
        q = tl.reshape(q, (1, 1, WIDTH))
        place = tl.arange(0, WIDTH)[None, None, :]
        exists = place < rows * TILE.n
        if PACKED:
            place = tl.arange(0, WIDTH // 2)[None, None, :]
            exists = place < rows * TILE.n // 2 + GROUPS * TILE.n % 2
    else:
        row = tl.arange(0, TILE.rows)[:, None, None]
        place, exists = output_place(permutation_ptr, 0, TILE)
        if PACKED:
            place = tl.arange(0, TILE.padded_m * TILE.c // 2)[None, :]
            exists = place < TILE.n // 2
        place = row * (TILE.n // (1 + PACKED)) + place[None, :, :]
        exists = (row < rows) & exists[None, :, :]
    if PACKED:
        low, high = tl.split(tl.reshape(q, (place.shape[0], 1, place.shape[2], 2)))
        q = ((low & 15) | (high << 4)).to(tl.uint8, bitcast=True)
    # A thread holds as many values as a vector of the dtype of x, and stores them as they are. More bytes would fit in
    # one store, but for a larger max_contiguous Triton exchanges the tile once more.
    target = tl.max_contiguous(start + place, (1, 1, TILE.vector // (1 + PACKED)))
    tl.store(q_ptr + target, q, mask=exists)
