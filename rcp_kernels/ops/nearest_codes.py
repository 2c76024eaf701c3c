"""The code of the nearest level of every weight."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import BITS, check_group_size, num_groups, pack_codes, row_bytes
from ..formats.codes import row_chunks

__all__ = ["nearest_codes", "nearest_codes_reference"]

# A chunk and its temporaries stay in a core's cache over several passes.
CHUNK_WEIGHTS = 1 << 20


def nearest_codes(weight: Tensor, table: Tensor, group_size: int, packed: bool = False) -> Tensor:
    """The number of midpoints between neighbouring levels that lie below each weight.

    A weight midway between two levels gets the lower level. On devices other than the CPU the reference runs. Not
    differentiable.

    Args:
        weight: float32 [N, K]; NaN gets code 0.
        table: float32 [N, ceil(K / group_size), 2**bits], ascending, with 2, 3 or 4 bits: the values of the levels.
        group_size: weights along K that share a table; where ``packed``, a size of the packed format.
        packed: return the bit stream of :func:`rcp_kernels.formats.pack_codes`.

    Returns:
        uint8 [N, K]; where packed, [N, ceil(ceil(K / group_size) * group_size * bits / 8)].

    Raises:
        ValueError: another dtype, shape or group size.
    """
    return torch.ops.rcp_kernels.nearest_codes.default(weight, table, group_size, packed)


def _check_arguments(weight: Tensor, table: Tensor, group_size: int, packed: bool) -> int:
    if weight.dim() != 2 or weight.shape[1] == 0 or weight.dtype != torch.float32:
        raise ValueError(
            f"nearest_codes: weight must be float32 [rows, columns] with at least one column, got {weight.dtype} of "
            f"shape {tuple(weight.shape)}; flatten leading dimensions"
        )
    if group_size < 1:
        raise ValueError(f"nearest_codes: group_size must be at least 1, got {group_size}; pass that of the table")
    if packed:
        try:
            check_group_size(group_size, weight.shape[1])
        except ValueError as error:
            raise ValueError(f"nearest_codes: {error}") from None
    shape = (weight.shape[0], num_groups(weight.shape[1], group_size))
    fits = table.dim() == 3 and tuple(table.shape[:2]) == shape and table.dtype == torch.float32
    bits = next((bits for bits in BITS if fits and table.shape[2] == 2**bits), None)
    if bits is None:
        raise ValueError(
            f"nearest_codes: table must be float32 [rows, groups, 4, 8 or 16], rows and groups {shape}, got "
            f"{table.dtype} of shape {tuple(table.shape)}; pass the levels of this weight"
        )
    return bits


@torch.library.register_fake("rcp_kernels::nearest_codes")
def _fake(weight: Tensor, table: Tensor, group_size: int, packed: bool = False) -> Tensor:
    bits = int(table.shape[2]).bit_length() - 1
    columns = row_bytes(weight.shape[1], bits, group_size) if packed else weight.shape[1]
    return weight.new_empty((weight.shape[0], columns), dtype=torch.uint8)


def nearest_codes_reference(weight: Tensor, table: Tensor, group_size: int, packed: bool = False) -> Tensor:
    """:func:`nearest_codes` in plain torch, on any device: both results are equal.

    Raises:
        ValueError: as the operator does.
    """
    bits = _check_arguments(weight, table, group_size, packed)
    rows, columns = weight.shape
    codes = torch.empty((rows, columns), dtype=torch.uint8, device=weight.device)
    # Halved before the sum, as the sum could overflow.
    midpoints = table[..., 1:] * 0.5 + table[..., :-1] * 0.5
    for chunk in row_chunks(rows, columns, CHUNK_WEIGHTS):
        for group in range(midpoints.shape[1]):
            part = slice(group * group_size, (group + 1) * group_size)
            above = weight[chunk, part, None] > midpoints[chunk, group, None]
            codes[chunk, part] = above.sum(-1, dtype=torch.uint8)
    return pack_codes(codes, bits, group_size) if packed else codes


torch.library.impl("rcp_kernels::nearest_codes", "default", nearest_codes_reference)
