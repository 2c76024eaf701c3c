"""Matrix fragments of mma.sync after the tables of the PTX ISA: which lane holds which elements.

A lane is 4 * group + member, of 8 groups with 4 members. Registers of A hold runs of e consecutive elements along K,
e = 4 for 8 bits and 2 for 16: register (h, r) of a lane is row group + 8 r, columns 4 e h + e member + 0..e-1, r before
h. B is the same with its columns n for rows. An accumulator (r, j) is row group + 8 r, column 2 member + j.
"""

from __future__ import annotations

import numpy as np

__all__ = ["accumulators", "matrix_a", "matrix_b", "matrix_c"]


def matrix_a(registers: list[np.ndarray], rows: int) -> np.ndarray:
    """Elements [lanes, e] of each register -> [warps, rows, K]."""
    elements = registers[0].shape[1]
    halves = rows // 8
    stacked = np.stack(registers).reshape(-1, halves, registers[0].shape[0] // 32, 8, 4, elements)
    # h, r, warp, group, member, element -> warp, (r, group), (h, member, element)
    return np.ascontiguousarray(stacked.transpose(2, 1, 3, 0, 4, 5)).reshape(stacked.shape[2], rows, -1)


def matrix_b(registers: list[np.ndarray]) -> np.ndarray:
    """Elements [lanes, e] of each register -> [warps, K, 8]."""
    return matrix_a(registers, 8).transpose(0, 2, 1)


def matrix_c(values: list[np.ndarray]) -> np.ndarray:
    """Accumulators [lanes], two a row of the lane -> [warps, rows, 8]."""
    stacked = np.stack(values).reshape(-1, 2, values[0].size // 32, 8, 4)
    # r, j, warp, group, member -> warp, (r, group), (member, j)
    return np.ascontiguousarray(stacked.transpose(2, 0, 3, 4, 1)).reshape(stacked.shape[2], -1, 8)


def accumulators(matrix: np.ndarray) -> list[np.ndarray]:
    """The inverse of :func:`matrix_c`."""
    warps, rows, _ = matrix.shape
    split = matrix.reshape(warps, rows // 8, 8, 4, 2).transpose(1, 4, 0, 2, 3)
    return list(np.ascontiguousarray(split).reshape(rows // 4, warps * 32))
