"""Sizes m * 2^k: the product with the m x m base, and where its rows go in sequency order."""

# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment, misc"

from __future__ import annotations

import triton
import triton.language as tl

from .butterflies import hadamard_rows, walsh_rows


@triton.jit
def _odd_rank(row, permutation_ptr, STEP: tl.constexpr, TILE: tl.constexpr):
    """The rank of each row of the base in columns of odd sequency."""
    rank = tl.zeros(row.shape, tl.int32)
    for first in range(0, TILE.m, STEP):
        r = first + tl.arange(0, STEP)
        odd_row = tl.load(permutation_ptr + TILE.m + r, mask=r < TILE.m, other=-TILE.c) // TILE.c
        rank += tl.sum(tl.where(row[:, None] == odd_row[None, :], r[None, :], 0), 1)
    return rank


@triton.jit
def dense_tile(x_ptr, base_ptr, permutation_ptr, block, rows, TILE: tl.constexpr):
    """(base kron H_c) x in float32, unscaled. A tile without chunks gives (base kron I) x for a block of columns.

    Returns:
        [rows, 1, m * columns] in natural order. [rows, columns, m] in sequency order, with columns in sequency order.
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
            # A column is a sequency of the power of two. Its entry j is the row of the base that has rank j there.
            row_j = tl.load(permutation_ptr + j, mask=j < M, other=0) // C
            place = j[None, :]
            if C > 1:
                odd = (column % 2 == 1)[:, None]
                place = tl.where(odd, _odd_rank(row_j, permutation_ptr, PADDED_M, TILE)[None, :], place)
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
            y = walsh_rows(y, TILE)
        else:
            y = hadamard_rows(y, TILE)
    if TILE.interleaved:
        y = tl.permute(tl.reshape(y, (ROWS, PADDED_M, COLUMNS)), (0, 2, 1))
    else:
        y = tl.reshape(y, (ROWS, 1, PADDED_M * COLUMNS))
    return y


@triton.jit
def output_place(permutation_ptr, block, TILE: tl.constexpr):
    """The place of each value of a tile's row in its transform, and whether the value is part of the transform."""
    PADDED_M: tl.constexpr = TILE.padded_m
    COLUMNS: tl.constexpr = TILE.columns
    if TILE.interleaved:
        rank = tl.arange(0, PADDED_M)
        row = tl.load(permutation_ptr + rank, mask=rank < TILE.m, other=0) // TILE.c
        column = block * COLUMNS + tl.arange(0, COLUMNS)
        odd = (column % 2 == 1)[:, None]
        place = tl.where(odd, _odd_rank(row, permutation_ptr, 16, TILE)[None, :], rank[None, :])
        place += column[:, None] * TILE.m
        exists = tl.broadcast_to((rank < TILE.m)[None, :], (COLUMNS, PADDED_M))
    else:
        place = tl.arange(0, PADDED_M * COLUMNS)[None, :]
        if TILE.blocks > 1:
            place = place // COLUMNS * TILE.c + block * COLUMNS + place % COLUMNS
        exists = place < TILE.n
    return place, exists
