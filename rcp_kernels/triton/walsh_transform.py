"""The Walsh-Hadamard transform on CUDA, in Triton: alone, in place, and fused with activation quantization.

**Powers of two** (``base`` None). A tile of whole rows lives in registers. The butterflies are those of the CPU kernel,
stride 1, 2, 4, ... in float32, so both give the same bits. They run in chunks: the bits of a chunk are register bits of
a thread, and between two chunks the tile is exchanged once, through shared memory or, inside a warp, by shuffles.
n = 4096 takes four chunks, three exchanges, one read and one write.

Sequency order costs nothing, by two observations. With j_i the bits of the natural index, sequency s has the bits
``s[k-1-i] = j_0 ^ ... ^ j_i =: c_i``: a Gray code and a bit reversal.

- The Gray code: stage i writes its results to c_i = j_i ^ c_(i-1) instead of j_i, so a + b and a - b swap places where
  c_(i-1) is 1. Inside a chunk that is another register; at a chunk's first stage it is the sign of b, and
  a + (-1)^c * b is one fused multiply-add, exact like the sum.
- The bit reversal: each chunk takes its bits from the bottom of the index and puts them, reversed, on top of those to
  come, as in an autosort FFT. The exchange that the next chunk needs anyway does it. The last chunk holds the lowest
  bits of s, so its threads end with consecutive outputs and store vectors.

**m * 2^k** (``base`` [m, m]). First ``base @ x`` with x as [m, 2^k], then the butterflies. The product of float16 and
bfloat16 runs on tensor cores, x and +-1 being exact there, with float32 sums; that of float32 is float32 multiply-adds.
The two factors commute, so only rounding tells this from the CPU, which takes the butterflies first.
In sequency order row (i, a) of base kron Sylvester comes at ``m * sequency(a) + rank``, where the rank of i among the
rows of the base depends on nothing but the parity of sequency(a). The rows of the base are loaded by the even rank and
the butterflies put a in order. The odd half, where ranks are nearly reversed, is permuted within runs of m by the
addresses of the store: 32 lanes write 32 neighbours, but no vectors.

**Quantized** (:func:`walsh_quantize`). The tile is one token with all its groups, whose largest magnitude then is a
reduction over registers; a token of several tiles is transformed twice, the second time mostly from L2. A token that
holds NaN or Inf, or whose transform overflows the dtype of x, gets scale NaN and q = 0: CUDA cannot raise without a
synchronisation.

Tiles, warps and chunks come from :func:`tile_config`, by size, with the reasons; nothing is tuned at run time.
"""

# Kernels: most arguments have no type that mypy knows, tuples grow as loops are unrolled, and `(*a, b)` is not Triton.
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment, misc"
# ruff: noqa: RUF005

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["Tile", "tile_config", "walsh_quantize", "walsh_transform", "walsh_transform_"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# What the decorators below read too.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_LARGEST = 32768  # the largest size of a transform
_TILE = 16384  # the largest tile to exchange at once: 64 KiB of shared memory, which every architecture has


@dataclass(frozen=True)
class Tile:
    """What one block of threads works on. A compile-time constant of the kernels."""

    n: int  # size of the transform: m * c
    m: int  # order of the dense factor, whose rows are all in the tile
    columns: int  # how many of the c columns are
    rows: int  # transforms in the tile, 1 if it does not have all columns
    sequency: bool
    inverse: bool
    chunks: tuple[int, ...]  # bits of c per chunk of butterflies, lowest first; none in a tile of some columns
    passengers: int  # low bits that the last chunk of a natural-order transform takes along
    halves: int  # parts of a row that pass through shared memory one after the other
    step: int  # columns of the dense factor per step of its product
    vector: int  # consecutive values in a thread when it stores
    tensor_cores: bool
    interpreted: bool
    warps: int
    max_registers: int | None  # per thread; None leaves it to the compiler

    @property
    def options(self) -> dict[str, Any]:
        """For Triton's compiler."""
        return {"num_warps": self.warps, "num_stages": 2, "maxnreg": self.max_registers}

    @property
    def c(self) -> int:
        return self.n // self.m

    @property
    def blocks(self) -> int:
        """Tiles that share a transform."""
        return self.c // self.columns

    @property
    def padded_m(self) -> int:
        return triton.next_power_of_2(self.m)

    @property
    def interleaved(self) -> bool:
        """Whether the output order is that of :func:`_place`, not the order of the tile."""
        return self.m > 1 and self.c > 1 and self.sequency and not self.inverse


def _fits_one_tile(n: int, m: int) -> bool:
    """Whether one kernel does it all. Else the two factors take one each, with a float32 tensor between them.

    The product's operands pass through shared memory too, in 16 rows of c columns at least: 512 columns take 32 KiB.
    """
    return m == 1 or (triton.next_power_of_2(m) * (n // m) <= _TILE and n // m <= 512)


def _even_chunks(bits: int, largest: int) -> tuple[int, ...]:
    count = -(-bits // largest)
    return tuple(bits // count + (i < bits % count) for i in range(count))


def _chunks(bits: int, vector: int, registers: int, sequency: bool, one_row: bool) -> tuple[tuple[int, ...], int]:
    """Bits per chunk, and passengers, for threads that load vectors of 2^vector and hold 2^registers values.

    The first chunk is what a vector load brings into a thread. In sequency order the last one is what a vector store
    takes. In natural order the threads of a store hold a vector of low bits and, since that is where a tile's registers
    go when its threads are used up, the top bits of the tile: the last chunk is these top bits if the tile is one row,
    and the low bits are its passengers. (If it is several rows, Triton adds one exchange before the store.)
    """
    if bits <= vector:
        return (bits,), 0
    if sequency:
        first = min(vector, bits - vector)
        return (first, *_even_chunks(bits - first - vector, registers), vector), 0
    if one_row:
        last = registers - vector
        return (vector, *_even_chunks(bits - vector - last, registers), last), vector
    return (vector, *_even_chunks(bits - vector, registers)), 0


def tile_config(
    n: int,
    dtype: torch.dtype,
    m: int = 1,
    groups: int = 0,
    sequency: bool = True,
    inverse: bool = False,
    tensor_cores: bool = True,
) -> Tile:
    """The tile for transforms of size n = m * 2^k, or for a token of `groups` of them if that is not 0.

    dtype is that of x. With a dense factor the tile is the same for both, so that both are the same instructions and
    give the same bits. Where one tile cannot do all, it is for the dense factor alone.
    """
    c = n // m
    one_tile = _fits_one_tile(n, m)
    # For the dense factor alone: 4096 values, as for the others.
    columns = c if one_tile else max(16, 4096 // triton.next_power_of_2(m))
    width = triton.next_power_of_2(m) * columns
    if not one_tile:
        rows = 1
    elif groups and m == 1:
        # At least a warp of threads with two values each.
        rows = max(min(triton.next_power_of_2(groups), _TILE // width), 64 // width, 1)
    else:
        # 2048 values are 4 warps with 16 values a thread: small enough to fill a GPU with few rows, large enough to
        # have 4 KiB in flight a block, and up to 16 blocks on a multiprocessor, so that some load while others compute.
        rows = max(1, 2048 // width)
    tile = rows * width
    # 16 values a thread make chunks of 4 bits; above 4096 values they are 32, for chunks of 5 bits and fewer exchanges.
    # 32768 values would need 1024 threads, whose 64 registers do not hold 32 values and what else it takes without
    # spilling: there 512 threads hold 64 each, in two halves.
    halves = 2 if width == _LARGEST else 1
    warps = max(1, min(16, tile // (32 * (16 if tile <= 4096 else 32))))
    bits = c.bit_length() - halves
    registers = (tile // (32 * warps)).bit_length() - halves
    vector = min(registers, 2 if dtype == torch.float32 else 3)
    chunks: tuple[int, ...]
    if m > 1:
        chunks, passengers = _even_chunks(bits, registers) if one_tile else (), 0
    elif halves == 2 and sequency:
        # The outputs of the two halves alternate: half a vector of each makes a vector to store. 5-bit chunks spill.
        chunks, passengers = (vector, *_even_chunks(bits - 2 * vector + 1, 4), vector - 1), 0
    else:
        chunks, passengers = _chunks(bits, vector, registers, sequency, rows == 1)
    tensor_cores = tensor_cores and dtype != torch.float32 and not (_INTERPRETED and dtype == torch.bfloat16)
    return Tile(
        n=n,
        m=m,
        columns=columns,
        rows=rows,
        sequency=sequency,
        inverse=inverse,
        chunks=chunks,
        passengers=passengers,
        halves=halves,
        # 16 is the least that Triton takes. On tensor cores 32 halves the steps and pads m little; multiply-adds would
        # spill the operands.
        step=32 if tensor_cores and m > 16 else 16,
        vector=2**vector,
        tensor_cores=tensor_cores,
        interpreted=_INTERPRETED,
        warps=warps,
        # By itself ptxas keeps 512 threads to 64 registers, so that two blocks fit, and here spills a word for it.
        max_registers=128 if groups and warps == 16 and (m > 1 or groups > rows) else None,
    )


@triton.jit
def _split_low_bits(x, BITS: tl.constexpr):
    """[A, H, 2^BITS] as 2^BITS tensors [1, A, H]: the last axis, which the layout then keeps inside a thread."""
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

    tl.join appends an axis and so keeps a pair in one thread. At the front the axis also is a register axis in the
    layout that Triton gives a tensor by default, whose lanes and warps take the last axes first: so nothing moves.
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
def _butterflies(x, sign, BITS: tl.constexpr, PASSENGERS: tl.constexpr, SEQUENCY: tl.constexpr, SIGNED: tl.constexpr):
    """Butterflies over the last axis of x [A, H, 2^BITS], but for its PASSENGERS lowest bits, as [2^BITS, A, H].

    In natural order the first axis of the result is the last axis of x. In sequency order its bits are reversed, the
    Gray code is applied, and `sign` [A, 1] is (-1) to the bit below the chunk.
    """
    parts = _split_low_bits(x, BITS)
    for i in tl.static_range(PASSENGERS, BITS):
        outputs = ()
        for p in tl.static_range(2**BITS):
            a = parts[p & ~(1 << i)]
            b = parts[p | (1 << i)]
            if SIGNED and i == 0:
                b = b * sign
            # The difference belongs where bit i is 1; in sequency order, where it differs from the bit below it.
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
def _walsh_rows(x, TILE: tl.constexpr):
    """The butterflies of each row of x [A, N], sequency order."""
    CHUNKS: tl.constexpr = TILE.chunks
    ROWS: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    for i in tl.static_range(len(CHUNKS)):
        # [A, N]: the rows and the finished bits, high to low sequency | the bits to come.
        x = tl.reshape(x, (x.shape[0], x.shape[1] // 2 ** CHUNKS[i], 2 ** CHUNKS[i]))
        sign = 1.0 - 2.0 * (tl.arange(0, x.shape[0]) & 1).to(tl.float32)[None, :, None]
        x = _butterflies(x, sign, CHUNKS[i], 0, True, i > 0)
        x = tl.permute(x, (1, 0, 2))
        x = tl.reshape(x, (x.shape[0] * x.shape[1], x.shape[2]))
    return tl.reshape(x, (ROWS, N))


@triton.jit
def _hadamard_chunk(x, BITS: tl.constexpr):
    """One chunk on x [rows, bits to come, finished bits]: BITS bits pass from the second axis to the third."""
    ROWS: tl.constexpr = x.shape[0]
    HIGH: tl.constexpr = x.shape[1] // 2**BITS
    LOW: tl.constexpr = x.shape[2]
    x = tl.permute(tl.reshape(x, (ROWS, HIGH, 2**BITS, LOW)), (0, 1, 3, 2))
    x = _butterflies(tl.reshape(x, (ROWS, HIGH * LOW, 2**BITS)), 1.0, BITS, 0, False, False)
    x = tl.permute(tl.reshape(x, (2**BITS, ROWS, HIGH, LOW)), (1, 2, 0, 3))
    return tl.reshape(x, (ROWS, HIGH, 2**BITS * LOW))


@triton.jit
def _last_hadamard_chunk(x, BITS: tl.constexpr, PASSENGERS: tl.constexpr):
    """The same for the top BITS bits. The lowest PASSENGERS bits come along, so that threads end with whole vectors."""
    ROWS: tl.constexpr = x.shape[0]
    LOW: tl.constexpr = x.shape[2] // 2**PASSENGERS
    x = tl.permute(tl.reshape(x, (ROWS, 2**BITS, LOW, 2**PASSENGERS)), (0, 2, 1, 3))
    x = _butterflies(
        tl.reshape(x, (ROWS, LOW, 2 ** (BITS + PASSENGERS))), 1.0, BITS + PASSENGERS, PASSENGERS, False, False
    )
    return tl.permute(tl.reshape(x, (2**BITS, 2**PASSENGERS, ROWS, LOW)), (2, 0, 3, 1))


@triton.jit
def _hadamard_rows(x, TILE: tl.constexpr):
    """The butterflies of each row of x [A, N], natural order."""
    CHUNKS: tl.constexpr = TILE.chunks
    PASSENGERS: tl.constexpr = TILE.passengers
    ROWS: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    x = tl.reshape(x, (ROWS, N, 1))
    for i in tl.static_range(len(CHUNKS) - 1):
        x = _hadamard_chunk(x, CHUNKS[i])
    x = _last_hadamard_chunk(x, CHUNKS[len(CHUNKS) - 1], PASSENGERS)
    return tl.reshape(x, (ROWS, N))


@triton.jit
def _power_of_two_tile(x_ptr, rows, TILE: tl.constexpr):
    """[rows, 1, n] in float32, unscaled. Two halves are transformed one after the other, in half the shared memory."""
    ROWS: tl.constexpr = TILE.rows
    HALVES: tl.constexpr = TILE.halves
    HALF: tl.constexpr = TILE.n // TILE.halves
    row = tl.arange(0, ROWS)[:, None]
    offset = row * TILE.n + tl.arange(0, HALF)[None, :]
    halves = ()
    for half in tl.static_range(HALVES):
        x = tl.load(x_ptr + half * HALF + offset, mask=row < rows, other=0.0).to(tl.float32)
        if TILE.sequency:
            halves = halves + (_walsh_rows(x, TILE),)
        else:
            halves = halves + (_hadamard_rows(x, TILE),)
    if HALVES == 1:
        y = halves[0]
    else:
        # The stage of the top bit. In sequency order it yields the lowest bit, and the bit below decides the sign.
        a = halves[0]
        b = halves[1]
        if TILE.sequency:
            b = b * (1.0 - 2.0 * (tl.arange(0, HALF) & 1).to(tl.float32)[None, :])
            y = tl.join(a + b, a - b)
        else:
            y = tl.permute(tl.join(a + b, a - b), (0, 2, 1))
    return tl.reshape(y, (ROWS, 1, HALVES * HALF))


@triton.jit
def _rank_when_odd(row, permutation_ptr, STEP: tl.constexpr, TILE: tl.constexpr):
    """The rank of each row of the base where the sequency within the power of two is odd."""
    rank = tl.zeros(row.shape, tl.int32)
    for first in range(0, TILE.m, STEP):
        r = first + tl.arange(0, STEP)
        odd_row = tl.load(permutation_ptr + TILE.m + r, mask=r < TILE.m, other=-TILE.c) // TILE.c
        rank += tl.sum(tl.where(row[:, None] == odd_row[None, :], r[None, :], 0), 1)
    return rank


@triton.jit
def _dense_tile(x_ptr, base_ptr, permutation_ptr, block, rows, TILE: tl.constexpr):
    """(base kron H_c) x in float32, unscaled, or only (base kron I) x for a block of columns if there are no chunks.

    Natural order: [rows, 1, m * columns]. Sequency order: [rows, columns, m], and the columns are in sequency order.
    """
    ROWS: tl.constexpr = TILE.rows
    M: tl.constexpr = TILE.m
    PADDED_M: tl.constexpr = TILE.padded_m
    C: tl.constexpr = TILE.c
    COLUMNS: tl.constexpr = TILE.columns
    STEP: tl.constexpr = TILE.step
    column = tl.arange(0, ROWS * COLUMNS)
    start = column // COLUMNS * TILE.n
    valid = column // COLUMNS < rows
    column = block * COLUMNS + column % COLUMNS
    i = tl.arange(0, PADDED_M)
    row = i
    if TILE.sequency and not TILE.inverse:
        row = tl.load(permutation_ptr + i, mask=i < M, other=0) // C
    total = tl.zeros((PADDED_M, ROWS * COLUMNS), tl.float32)
    for first in range(0, M, STEP):
        j = first + tl.arange(0, STEP)
        if TILE.sequency and TILE.inverse:
            # A column is a sequency of the power of two, and holds the row of the base whose rank there is j.
            row_j = tl.load(permutation_ptr + j, mask=j < M, other=0) // C
            place = j[None, :]
            if C > 1:
                odd = (column % 2 == 1)[:, None]
                place = tl.where(odd, _rank_when_odd(row_j, permutation_ptr, PADDED_M, TILE)[None, :], place)
            place = (start + column * M)[:, None] + place
            x = tl.load(x_ptr + place, mask=valid[:, None] & (j < M)[None, :], other=0.0)
            x = tl.trans(x if TILE.tensor_cores else x.to(tl.float32))
        else:
            row_j = j
            place = (start + column)[None, :] + j[:, None] * C
            x = tl.load(x_ptr + place, mask=valid[None, :] & (j < M)[:, None], other=0.0)
            x = x if TILE.tensor_cores else x.to(tl.float32)
        if TILE.inverse:
            entry = row_j[None, :] * M + row[:, None]
        else:
            entry = row[:, None] * M + row_j[None, :]
        signs = tl.load(base_ptr + entry, mask=(i < M)[:, None] & (j < M)[None, :], other=0.0)
        if TILE.tensor_cores:
            total = tl.dot(signs.to(x.dtype), x, total)
        else:
            total = tl.dot(signs, x, total, input_precision="ieee")
    y = tl.permute(tl.reshape(total, (PADDED_M, ROWS, COLUMNS)), (1, 0, 2))
    if len(TILE.chunks) > 0:
        y = tl.reshape(y, (ROWS * PADDED_M, C))
        if TILE.sequency:
            y = _walsh_rows(y, TILE)
        else:
            y = _hadamard_rows(y, TILE)
    if TILE.interleaved:
        y = tl.permute(tl.reshape(y, (ROWS, PADDED_M, COLUMNS)), (0, 2, 1))
    else:
        y = tl.reshape(y, (ROWS, 1, PADDED_M * COLUMNS))
    return y


@triton.jit
def _place(permutation_ptr, block, TILE: tl.constexpr):
    """Where in its transform each value of a row of the tile belongs, and whether it does."""
    PADDED_M: tl.constexpr = TILE.padded_m
    COLUMNS: tl.constexpr = TILE.columns
    if TILE.interleaved:
        rank = tl.arange(0, PADDED_M)
        row = tl.load(permutation_ptr + rank, mask=rank < TILE.m, other=0) // TILE.c
        column = block * COLUMNS + tl.arange(0, COLUMNS)
        odd = (column % 2 == 1)[:, None]
        place = tl.where(odd, _rank_when_odd(row, permutation_ptr, 16, TILE)[None, :], rank[None, :])
        place += column[:, None] * TILE.m
        exists = tl.broadcast_to((rank < TILE.m)[None, :], (COLUMNS, PADDED_M))
    else:
        place = tl.arange(0, PADDED_M * COLUMNS)[None, :]
        if TILE.blocks > 1:
            place = place // COLUMNS * TILE.c + block * COLUMNS + place % COLUMNS
        exists = place < TILE.n
    return place, exists


@triton.jit
def _rounded(y, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    if INTERPRETED and DTYPE == tl.bfloat16:
        # Triton's interpreter truncates where every GPU rounds to nearest even.
        bits = y.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        y = tl.where(y == y, nearest, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        y = y.to(DTYPE)
    return y


@triton.jit
def _transformed_tile(x_ptr, base_ptr, permutation_ptr, block, rows, scale, DTYPE: tl.constexpr, TILE: tl.constexpr):
    """The transform of the first `rows` rows at x_ptr, as the tile has it: see :func:`_place`."""
    if TILE.m == 1:
        y = _power_of_two_tile(x_ptr, rows, TILE)
    else:
        y = _dense_tile(x_ptr, base_ptr, permutation_ptr, block, rows, TILE)
    return _rounded(y * scale, DTYPE, TILE.interpreted)


@triton.jit
def _transform_kernel(x_ptr, y_ptr, base_ptr, permutation_ptr, rows, scale, TILE: tl.constexpr):
    """One tile of rows, or of columns of a row."""
    first = (tl.program_id(0) // TILE.blocks).to(tl.int64) * TILE.rows
    block = tl.program_id(0) % TILE.blocks
    left = tl.minimum(rows - first, TILE.rows).to(tl.int32)
    x_ptr += first * TILE.n
    y = _transformed_tile(x_ptr, base_ptr, permutation_ptr, block, left, scale, y_ptr.dtype.element_ty, TILE)
    row = tl.arange(0, TILE.rows)[:, None, None]
    place, exists = _place(permutation_ptr, block, TILE)
    target = row * TILE.n + place[None, :, :]
    tl.store(y_ptr + first * TILE.n + target, y, mask=(row < left) & exists[None, :, :])


@triton.jit
def _largest_magnitude(y, TILE: tl.constexpr):
    """The largest magnitude in a tile as the bits of a float32: they order like it, NaN and Inf above all others."""
    largest = y.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    # Inside a thread first. A reduction alone would have Triton exchange the whole tile for another layout.
    VALUES: tl.constexpr = TILE.rows * TILE.padded_m * TILE.c
    for i in tl.static_range(TILE.vector.bit_length() - 1):
        even, odd = tl.split(tl.reshape(largest, (VALUES // 2 ** (i + 1), 2)))
        largest = tl.maximum(even, odd)
    return tl.max(largest)


@triton.jit
def _token_scale(largest, clip, QMAX: tl.constexpr):
    """The steps of docs/numerics.md: the scale, and its inverse, or 0 if the token vanishes or is not finite."""
    finite = largest < 0x7F800000
    scale = tl.div_rn(largest.to(tl.float32, bitcast=True) * clip, QMAX * 1.0)
    usable = finite & (scale >= 7.52316384526264e-37)  # 2^-120
    inverse = tl.where(usable, tl.div_rn(1.0, tl.where(usable, scale, 1.0)), 0.0)
    return tl.where(usable, scale, tl.where(finite, 0.0, float("nan"))), inverse


@triton.jit
def _store_quantized(
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
    # Selected, not multiplied, to 0: a token may hold NaN or Inf.
    value = tl.where(inverse > 0.0, y.to(tl.float32) * inverse, 0.0)
    value = tl.minimum(tl.maximum(value, -QMAX - 1.0), QMAX * 1.0)
    # Half to even: 1.5 * 2^23 + value has no bits below the units.
    q = ((value + 12582912.0) - 12582912.0).to(tl.int8)
    if TILE.m == 1:
        # Rows are consecutive, and one by one may be too short to make a byte.
        WIDTH: tl.constexpr = TILE.rows * TILE.n
        q = tl.reshape(q, (1, 1, WIDTH))
        place = tl.arange(0, WIDTH)[None, None, :]
        exists = place < rows * TILE.n
        if PACKED:
            place = tl.arange(0, WIDTH // 2)[None, None, :]
            exists = place < rows * TILE.n // 2 + GROUPS * TILE.n % 2
    else:
        row = tl.arange(0, TILE.rows)[:, None, None]
        place, exists = _place(permutation_ptr, 0, TILE)
        if PACKED:
            place = tl.arange(0, TILE.padded_m * TILE.c // 2)[None, :]
            exists = place < TILE.n // 2
        place = row * (TILE.n // (1 + PACKED)) + place[None, :, :]
        exists = (row < rows) & exists[None, :, :]
    if PACKED:
        low, high = tl.split(tl.reshape(q, (place.shape[0], 1, place.shape[2], 2)))
        q = ((low & 15) | (high << 4)).to(tl.uint8, bitcast=True)
    # A thread holds a vector of the dtype of x. As many bytes, though more would fit in one store, are stored as they
    # are: told of more, Triton would exchange the tile once more.
    target = tl.max_contiguous(start + place, (1, 1, TILE.vector // (1 + PACKED)))
    tl.store(q_ptr + target, q, mask=exists)


@triton.jit
def _quantize_kernel(
    x_ptr,
    q_ptr,
    scale_ptr,
    base_ptr,
    permutation_ptr,
    scale,
    clip,
    GROUPS: tl.constexpr,
    QMAX: tl.constexpr,
    PACKED: tl.constexpr,
    TILE: tl.constexpr,
):
    """One token of GROUPS transforms; if they need several tiles, each is transformed twice."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    token = tl.program_id(0)
    x_ptr += token.to(tl.int64) * (GROUPS * TILE.n)
    start = token.to(tl.int64) * ((GROUPS * TILE.n + PACKED) // (1 + PACKED))
    if TILE.rows >= GROUPS:
        y = _transformed_tile(x_ptr, base_ptr, permutation_ptr, 0, GROUPS, scale, DTYPE, TILE)
        token_scale, inverse = _token_scale(_largest_magnitude(y, TILE), clip, QMAX)
        _store_quantized(y, inverse, q_ptr, start, permutation_ptr, GROUPS, GROUPS, QMAX, PACKED, TILE)
    else:
        largest = tl.full((), 0, tl.int32)
        for first in range(0, GROUPS, TILE.rows):
            y = _transformed_tile(
                x_ptr + first * TILE.n, base_ptr, permutation_ptr, 0, GROUPS - first, scale, DTYPE, TILE
            )
            largest = tl.maximum(largest, _largest_magnitude(y, TILE))
        token_scale, inverse = _token_scale(largest, clip, QMAX)
        for first in range(0, GROUPS, TILE.rows):
            y = _transformed_tile(
                x_ptr + first * TILE.n, base_ptr, permutation_ptr, 0, GROUPS - first, scale, DTYPE, TILE
            )
            there = start + first * TILE.n // (1 + PACKED)
            _store_quantized(y, inverse, q_ptr, there, permutation_ptr, GROUPS - first, GROUPS, QMAX, PACKED, TILE)
    tl.store(scale_ptr + token, token_scale)


def _on_device_of(x: Tensor) -> Any:
    """Triton launches on the current device. (A CPU tensor is here under the interpreter.)"""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@cache
def _has_tensor_cores(device: torch.device) -> bool:
    """Whether Triton uses this GPU's tensor cores; those of sm_75 it does not."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 8


def _checked(
    name: str, x: Tensor, base: Tensor | None, permutation: Tensor | None, group_size: int
) -> tuple[int, Tensor, Tensor]:
    """The order m of the dense factor, and tensors to pass where there is no base and no permutation."""
    if x.dtype not in _DTYPES:
        raise ValueError(f"{name}: x must be float32, float16 or bfloat16, got {x.dtype}; convert it first")
    if x.dim() < 1 or group_size < 1 or x.shape[-1] % group_size:
        raise ValueError(
            f"{name}: group_size must divide the last dimension of x, got group_size {group_size} and shape "
            f"{tuple(x.shape)}; choose a divisor"
        )
    if base is not None and (
        base.dtype != torch.float32 or base.dim() != 2 or base.shape[0] != base.shape[1] or base.device != x.device
    ):
        raise ValueError(
            f"{name}: base must be a square float32 matrix on {x.device}, got {base.dtype} {tuple(base.shape)} on "
            f"{base.device}; convert it first"
        )
    m = 1 if base is None else base.shape[0]
    c = group_size // m
    if group_size != m * c or c & (c - 1) or group_size > _LARGEST:
        raise ValueError(
            f"{name}: group_size must be a power of two times {m}, the order of base, and at most {_LARGEST}, got "
            f"{group_size}; choose a smaller one"
        )
    if permutation is not None and (
        permutation.dtype != torch.int32 or permutation.shape != (group_size,) or permutation.device != x.device
    ):
        raise ValueError(
            f"{name}: permutation must be int32 [{group_size}] on {x.device}, got {permutation.dtype} "
            f"{tuple(permutation.shape)} on {permutation.device}; convert it first"
        )
    return m, x if base is None else base.contiguous(), x if permutation is None else permutation.contiguous()


def _launch(x: Tensor, y: Tensor, base: Tensor, permutation: Tensor, rows: int, scale: float, tile: Tile) -> None:
    with _on_device_of(x):
        _transform_kernel[(triton.cdiv(rows, tile.rows) * tile.blocks,)](
            x, y, base, permutation, rows, scale, TILE=tile, **tile.options
        )


def _transform_into(
    y: Tensor, x: Tensor, base: Tensor | None, permutation: Tensor | None, n: int, scale: float, inverse: bool
) -> None:
    m, base_argument, permutation_argument = _checked("walsh_transform", x, base, permutation, n)
    if x.numel() == 0:
        return
    sequency = permutation is not None
    rows = x.numel() // n
    arguments = (base_argument, permutation_argument)
    cores = _has_tensor_cores(x.device)
    if _fits_one_tile(n, m):
        _launch(x, y, *arguments, rows, scale, tile_config(n, x.dtype, m, 0, sequency, inverse, cores))
        return
    between = torch.empty_like(x, dtype=torch.float32)
    # The butterflies in their own sequency order, which the tile of the dense factor takes as the order of columns.
    butterflies = tile_config(n // m, torch.float32, sequency=sequency)
    dense = tile_config(n, torch.float32 if not inverse else x.dtype, m, 0, sequency, inverse, cores)
    if inverse:
        _launch(x, between, *arguments, rows, 1.0, dense)
        _launch(between, y, *arguments, rows * m, scale, butterflies)
    else:
        _launch(x, between, *arguments, rows * m, 1.0, butterflies)
        _launch(between, y, *arguments, rows, scale, dense)


def walsh_transform(
    x: Tensor,
    base: Tensor | None,
    permutation: Tensor | None,
    group_size: int,
    scale: float,
    inverse: bool,
) -> Tensor:
    """``rcp_kernels::walsh_transform`` on CUDA: the transform of every group_size values along the last dimension.

    Args:
        x: float32, float16 or bfloat16 [..., K], any strides, group_size a divisor of K.
        base: float32 [m, m] of +-1 for group_size = m * 2^k, or None for m = 1.
        permutation: None for natural order; for sequency order the int32 [group_size] of ``sequency_permutation``.
            It is not an arbitrary one: powers of two do not read it, and m * 2^k reads its first 2 m entries.
        group_size: at most 32768. One kernel reads and writes x once, unless 2^k is above 512 or, times m rounded up to
            a power of two, above 16384, which only sizes above 8192 are: there it takes two kernels with a float32
            tensor between them.
        scale: multiplies the float32 result before it is rounded.
        inverse: the transpose instead. (For a power of two the transform is symmetric, and this is no difference.)

    Returns:
        [..., K], contiguous, in the dtype of x.
    """
    x = x.contiguous()
    y = torch.empty_like(x)
    _transform_into(y, x, base, permutation, group_size, scale, inverse)
    return y


def walsh_transform_(
    x: Tensor,
    base: Tensor | None,
    permutation: Tensor | None,
    group_size: int,
    scale: float,
    inverse: bool,
) -> None:
    """``rcp_kernels::walsh_transform_`` on CUDA: :func:`walsh_transform`, and x, which is contiguous, takes the result.

    A block of threads reads all that it will overwrite before it writes, so this needs no second tensor.
    """
    if not x.is_contiguous():
        raise ValueError(
            f"walsh_transform_: x must be contiguous to be overwritten, got strides {x.stride()}; pass inplace=False"
        )
    _transform_into(x, x, base, permutation, group_size, scale, inverse)


def walsh_quantize(
    x: Tensor,
    base: Tensor | None,
    permutation: Tensor | None,
    group_size: int,
    scale: float,
    inverse: bool,
    bits: int,
    clip: float = 1.0,
    packed: bool = False,
) -> tuple[Tensor, Tensor]:
    """``rcp_kernels::walsh_quantize`` on CUDA: quantize_activation of :func:`walsh_transform`, bit for bit.

    One kernel, except for m * 2^k where the transform takes two, where a token is many short transforms, and for packed
    values in sequency order, whose neighbours do not meet in a thread: there the quantization is one more.

    Args:
        x, base, permutation, group_size, scale, inverse: as for :func:`walsh_transform`. A token is a vector along the
            last dimension, all its groups.
        bits, clip, packed: as for ``quantize_activation``.

    Returns:
        q, int8 [..., K] or, packed, uint8 [..., ceil(K / 2)]; and scale, float32 [...]. A token that holds NaN or Inf,
        or whose transform overflows the dtype of x, has scale NaN and q = 0. (The CPU raises.)
    """
    if bits not in (4, 8):
        raise ValueError(f"walsh_quantize: bits must be 4 or 8, got {bits}; choose one of them")
    if not 0.0 < clip <= 1.0:
        raise ValueError(f"walsh_quantize: clip must be in (0, 1], got {clip}; 1.0 keeps the largest value")
    if packed and bits != 4:
        raise ValueError(f"walsh_quantize: packed storage is for 4 bits, got bits={bits}; pass packed=False")
    m, base_argument, permutation_argument = _checked("walsh_quantize", x, base, permutation, group_size)
    size = x.shape[-1]
    groups = size // group_size
    cores = _has_tensor_cores(x.device)
    tile = tile_config(group_size, x.dtype, m, groups, permutation is not None, inverse, cores)
    if m > 1 and (groups > tile.rows or not tile.chunks or (packed and tile.interleaved)):
        x = walsh_transform(x, base, permutation, group_size, scale, inverse)
        # What is left is to quantize a transform of size 1.
        groups, scale = size, 1.0
        tile = tile_config(1, x.dtype, 1, groups, sequency=False)
    x = x.contiguous()
    if packed:
        q = x.new_empty((*x.shape[:-1], (size + 1) // 2), dtype=torch.uint8)
    else:
        q = x.new_empty(x.shape, dtype=torch.int8)
    scales = x.new_empty(x.shape[:-1], dtype=torch.float32)
    if x.numel() == 0:
        return q, scales.zero_()
    with _on_device_of(x):
        _quantize_kernel[(x.numel() // size,)](
            x,
            q,
            scales,
            base_argument,
            permutation_argument,
            scale,
            clip,
            GROUPS=groups,
            QMAX=2 ** (bits - 1) - 1,
            PACKED=packed,
            TILE=tile,
            **tile.options,
        )
    return q, scales
