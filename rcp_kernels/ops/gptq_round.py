"""GPTQ's inner loop: round the columns of a group one after the other, with error feedback."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_tensor

__all__ = ["gptq_round", "gptq_round_reference"]

_MAX_LEVELS = 16


def gptq_round(block: Tensor, upper: Tensor, table: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Round columns ``first`` to ``last - 1`` of a block of a weight, and correct later columns by the error of each.

    For j from first to last - 1, in each row, with every product and every sum rounded to float32::

        q_j = nearest level of w_j    e_j = (w_j - q_j) * (1 / U_jj)    w_k -= e_j * U_jk  for all k > j of the block

    The result does not depend on the CPU or on the number of threads. On devices other than the CPU the reference runs.

    Args:
        block: float32 [N, B] with stride 1 along columns, changed in place. A rounded column keeps its value from
            before the rounding.
        upper: float32 [B, B] with stride 1 along columns; only the upper triangle is read.
        table: float32 [N, levels], ascending: the values of 2 to 16 levels.
        first: the first column to round.
        last: the column after the last to round.

    Returns:
        codes, uint8 [N, last - first]: the number of midpoints between neighbouring levels below each weight; and the
        errors e, float32 [N, last - first].

    Raises:
        ValueError: another dtype, shape, stride or range of columns.
    """
    return torch.ops.rcp_kernels.gptq_round.default(block, upper, table, first, last)


def _check_arguments(block: Tensor, upper: Tensor, table: Tensor, first: int, last: int) -> None:
    if block.dim() != 2 or block.dtype != torch.float32:
        raise ValueError(
            f"gptq_round: block must be float32 [rows, columns], got {block.dtype} of shape {tuple(block.shape)}; pass "
            f"columns of a weight"
        )
    rows, columns = block.shape
    check_tensor("gptq_round", "upper", upper, torch.float32, (columns, columns), "pass the same columns of the factor")
    if columns > 1 and (block.stride(1) != 1 or upper.stride(1) != 1):
        raise ValueError(
            f"gptq_round: neighbouring columns of block and upper must lie side by side, got strides "
            f"{block.stride(1)} and {upper.stride(1)}; pass contiguous tensors"
        )
    if not 0 <= first <= last <= columns:
        raise ValueError(
            f"gptq_round: 0 <= first <= last <= columns must hold, got first {first}, last {last} of {columns} "
            f"columns; count them from the block's start"
        )
    if (
        table.dim() != 2
        or table.shape[0] != rows
        or not 2 <= table.shape[1] <= _MAX_LEVELS
        or table.dtype != block.dtype
    ):
        raise ValueError(
            f"gptq_round: table must be float32 [{rows}, levels] with 2 to {_MAX_LEVELS} levels, got {table.dtype} of "
            f"shape {tuple(table.shape)}; pass the values of one group"
        )


@torch.library.register_fake("rcp_kernels::gptq_round")
def _fake(block: Tensor, upper: Tensor, table: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
    shape = (block.shape[0], last - first)
    return block.new_empty(shape, dtype=torch.uint8), block.new_empty(shape)


def gptq_round_reference(block: Tensor, upper: Tensor, table: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
    """:func:`gptq_round` in plain torch, on any device: on the CPU, both results are equal bit for bit.

    Raises:
        ValueError: as the operator does.
    """
    _check_arguments(block, upper, table, first, last)
    codes = block.new_empty((block.shape[0], last - first), dtype=torch.uint8)
    errors = block.new_empty((block.shape[0], last - first))
    # Halved before the sum, as the sum could overflow.
    bounds = table[:, 1:] * 0.5 + table[:, :-1] * 0.5
    inverse = upper.diagonal().reciprocal()
    for j in range(first, last):
        code = (block[:, j, None] > bounds).sum(1)
        codes[:, j - first] = code
        nearest = table.gather(1, code[:, None]).squeeze(1)
        error = (block[:, j] - nearest) * inverse[j]
        errors[:, j - first] = error
        # A product, then a sum, each rounded: addr might fuse them.
        block[:, j + 1 :] -= error[:, None] * upper[j, j + 1 :]
    return codes, errors


torch.library.impl("rcp_kernels::gptq_round", "default", gptq_round_reference)
