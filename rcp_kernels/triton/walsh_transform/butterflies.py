"""Butterflies of a power of two, chunk by chunk, in both orders."""

# mypy knows no types of kernel arguments, tuples grow as loops are unrolled, and `(*a, b)` is not Triton.
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment, misc"
# ruff: noqa: RUF005

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _split_low_bits(x, BITS: tl.constexpr):
    """x [A, H, 2^BITS] as 2^BITS tensors [1, A, H], which makes the layout keep the last axis inside a thread."""
    A: tl.constexpr = x.shape[0]
    H: tl.constexpr = x.shape[1]
    parts = (x,)
    for i in tl.static_range(BITS):
        even = ()
        odd = ()
        for p in tl.static_range(2**i):
            low, high = tl.split(tl.reshape(parts[p], (A, H, 2 ** (BITS - 1 - i), 2)))
            even = even + (low,)
            odd = odd + (high,)
        parts = even + odd
    flat = ()
    for p in tl.static_range(2**BITS):
        flat = flat + (tl.reshape(parts[p], (1, A, H)),)
    return flat


@triton.jit
def _stack_pairs(parts, COUNT: tl.constexpr, STEP: tl.constexpr, DISTANCE: tl.constexpr):
    """Pairs (STEP * i, STEP * i + DISTANCE) of the COUNT tensors [P, A, H], stacked along the first axis.

    tl.join appends an axis and so keeps a pair in one thread. Moved to the front, the axis is a register axis in
    Triton's default layout too, whose lanes and warps take the last axes first. So no data moves.
    """
    P: tl.constexpr = parts[0].shape[0]
    A: tl.constexpr = parts[0].shape[1]
    H: tl.constexpr = parts[0].shape[2]
    joined = ()
    for i in tl.static_range(COUNT // 2):
        pair = tl.permute(tl.join(parts[STEP * i], parts[STEP * i + DISTANCE]), (3, 0, 1, 2))
        joined = joined + (tl.reshape(pair, (2 * P, A, H)),)
    return joined


@triton.jit
def _butterflies(x, sign, BITS: tl.constexpr, CARRIED: tl.constexpr, SEQUENCY: tl.constexpr, SIGNED: tl.constexpr):
    """One chunk: butterflies over the last axis of x [A, H, 2^BITS], as [2^BITS, A, H].

    Args:
        sign: [1, A, 1], (-1) to the bit c below the chunk. Read only if SIGNED.
        CARRIED: this many low bits have no stages.
        SEQUENCY: apply the Gray code and reverse the bits of the first axis of the result. Otherwise the first axis is
            the last axis of x.
        SIGNED: there is a bit below the chunk, in sequency order.
    """
    parts = _split_low_bits(x, BITS)
    for i in tl.static_range(CARRIED, BITS):
        outputs = ()
        for p in tl.static_range(2**BITS):
            a = parts[p & ~(1 << i)]
            b = parts[p | (1 << i)]
            if SIGNED and i == 0:
                b = b * sign
            # The difference goes where bit i is 1. In sequency order it goes where bit i differs from the bit below.
            if ((p >> i) ^ (SEQUENCY * (2 * p >> i))) % 2 == 1:
                outputs = outputs + (a - b,)
            else:
                outputs = outputs + (a + b,)
        parts = outputs
    for i in tl.static_range(BITS):
        if SEQUENCY:
            parts = _stack_pairs(parts, 2 ** (BITS - i), 1, 2 ** (BITS - 1 - i))
        else:
            parts = _stack_pairs(parts, 2 ** (BITS - i), 2, 1)
    return parts[0]


@triton.jit
def walsh_rows(x, TILE: tl.constexpr):
    """The butterflies of each row of x [A, N], in sequency order."""
    CHUNKS: tl.constexpr = TILE.chunks
    ROWS: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    for i in tl.static_range(len(CHUNKS)):
        # x is [rows and finished bits from the highest down, bits to come].
        x = tl.reshape(x, (x.shape[0], x.shape[1] // 2 ** CHUNKS[i], 2 ** CHUNKS[i]))
        sign = 1.0 - 2.0 * (tl.arange(0, x.shape[0]) & 1).to(tl.float32)[None, :, None]
        x = _butterflies(x, sign, CHUNKS[i], 0, True, i > 0)
        x = tl.permute(x, (1, 0, 2))
        x = tl.reshape(x, (x.shape[0] * x.shape[1], x.shape[2]))
    return tl.reshape(x, (ROWS, N))


@triton.jit
def _hadamard_chunk(x, BITS: tl.constexpr):
    """One chunk of x [rows, bits to come, finished bits]: BITS bits move from the second axis to the third."""
    ROWS: tl.constexpr = x.shape[0]
    HIGH: tl.constexpr = x.shape[1] // 2**BITS
    LOW: tl.constexpr = x.shape[2]
    x = tl.permute(tl.reshape(x, (ROWS, HIGH, 2**BITS, LOW)), (0, 1, 3, 2))
    x = _butterflies(tl.reshape(x, (ROWS, HIGH * LOW, 2**BITS)), 1.0, BITS, 0, False, False)
    x = tl.permute(tl.reshape(x, (2**BITS, ROWS, HIGH, LOW)), (1, 2, 0, 3))
    return tl.reshape(x, (ROWS, HIGH, 2**BITS * LOW))


@triton.jit
def _last_hadamard_chunk(x, BITS: tl.constexpr, CARRIED: tl.constexpr):
    """The chunk of the top BITS bits. The lowest CARRIED bits come along, so that threads store whole vectors."""
    ROWS: tl.constexpr = x.shape[0]
    LOW: tl.constexpr = x.shape[2] // 2**CARRIED
    x = tl.permute(tl.reshape(x, (ROWS, 2**BITS, LOW, 2**CARRIED)), (0, 2, 1, 3))
    x = _butterflies(tl.reshape(x, (ROWS, LOW, 2 ** (BITS + CARRIED))), 1.0, BITS + CARRIED, CARRIED, False, False)
    return tl.permute(tl.reshape(x, (2**BITS, 2**CARRIED, ROWS, LOW)), (2, 0, 3, 1))


@triton.jit
def hadamard_rows(x, TILE: tl.constexpr):
    """The butterflies of each row of x [A, N], in natural order."""
    CHUNKS: tl.constexpr = TILE.chunks
    CARRIED: tl.constexpr = TILE.carried
    ROWS: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    x = tl.reshape(x, (ROWS, N, 1))
    for i in tl.static_range(len(CHUNKS) - 1):
        x = _hadamard_chunk(x, CHUNKS[i])
    x = _last_hadamard_chunk(x, CHUNKS[len(CHUNKS) - 1], CARRIED)
    return tl.reshape(x, (ROWS, N))


@triton.jit
def power_of_two_tile(x_ptr, rows, TILE: tl.constexpr):
    """The transforms of rows of a power of two as float32 [rows, 1, n], unscaled.

    Two halves are transformed one after the other, in half the shared memory.
    """
    ROWS: tl.constexpr = TILE.rows
    HALVES: tl.constexpr = TILE.halves
    HALF: tl.constexpr = TILE.n // TILE.halves
    row = tl.arange(0, ROWS)[:, None]
    offset = row * TILE.n + tl.arange(0, HALF)[None, :]
    halves = ()
    for half in tl.static_range(HALVES):
        x = tl.load(x_ptr + half * HALF + offset, mask=row < rows, other=0.0).to(tl.float32)
        if TILE.sequency:
            halves = halves + (walsh_rows(x, TILE),)
        else:
            halves = halves + (hadamard_rows(x, TILE),)
    if HALVES == 1:
        y = halves[0]
    else:
        # The stage of the top bit. In sequency order it gives the lowest bit of s, and the bit c before it is the sign.
        a = halves[0]
        b = halves[1]
        if TILE.sequency:
            b = b * (1.0 - 2.0 * (tl.arange(0, HALF) & 1).to(tl.float32)[None, :])
            y = tl.join(a + b, a - b)
        else:
            y = tl.permute(tl.join(a + b, a - b), (0, 2, 1))
    return tl.reshape(y, (ROWS, 1, HALVES * HALF))
