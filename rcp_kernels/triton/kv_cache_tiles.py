"""Sizes of the tiles and splits of the key-value cache's Triton kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

__all__ = ["POSITIONS", "Tile", "operand", "pairs", "splits_of", "tile_config"]

# The number of positions of a split is a multiple of this, and that of a tile divides it.
POSITIONS = 64
# Splits of one head. More programs than a GPU can run at once only make the second kernel longer.
_MOST_SPLITS = 64
_PROGRAMS = 512


def pairs(head_dim: int) -> int:
    """Nibble pairs of a vector, padded to what a tile and a dot product can have."""
    return max(16, triton.next_power_of_2((head_dim + 1) // 2))


def operand(dtype: torch.dtype, tensor_cores_take_bfloat16: bool) -> tl.dtype:
    """The type in which codes, queries and weights are multiplied. Sums are always float32.

    bfloat16 queries stay exact in bfloat16; before sm_80, whose tensor cores are the first to take it, in float32.
    """
    if dtype == torch.float16:
        return tl.float16
    return tl.bfloat16 if dtype == torch.bfloat16 and tensor_cores_take_bfloat16 else tl.float32


@dataclass(frozen=True)
class Tile:
    """What a program of the attention kernel works on at a time. Compile-time constants."""

    rows: int
    positions: int
    part: int  # nibble pairs per dot product
    warps: int


def tile_config(head_dim: int, operand_type: tl.dtype, tensor_cores: bool) -> Tile:
    """Tensor cores take no fewer than 16 rows. Without them, a thread has all of both operands' k in registers: few
    rows, few positions and a part of k at a time keep that below 255 of them.
    """
    if tensor_cores and operand_type != tl.float32:
        wide = pairs(head_dim) > 64
        return Tile(16, 32 if wide else 64, pairs(head_dim), 4)
    return Tile(4, 16, min(pairs(head_dim), 64), 4)


def splits_of(programs: int, positions: int) -> tuple[int, int]:
    """How many splits, and positions of each, where `programs` programs share one."""
    blocks = -(-positions // POSITIONS)
    splits = max(1, min(blocks, _MOST_SPLITS, _PROGRAMS // max(programs, 1)))
    size = -(-blocks // splits) * POSITIONS
    return -(-positions // size), size
