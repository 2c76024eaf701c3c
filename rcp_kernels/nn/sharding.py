"""One rank's part of a packed weight: a range of rows, or of whole groups of columns, without requantizing.

This is for tensor parallelism (Megatron-LM, Shoeybi et al. 2019). A column-parallel layer divides its outputs and takes
:func:`shard_rows` of its weight [N, K]. A row-parallel layer divides its inputs and takes :func:`shard_columns`.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ..formats import PackedWeight
from .online_rotation import OnlineRotation

__all__ = ["shard_columns", "shard_rotation", "shard_rows"]


def shard_rows(weight: PackedWeight, rank: int, world: int) -> PackedWeight:
    """Rows ``rank * N / world`` to ``(rank + 1) * N / world - 1``: outputs of the layer. Values are exact.

    Args:
        weight: [N, K].
        rank: 0 to world - 1.
        world: ranks; divides N.

    Returns:
        [N / world, K], contiguous copies. With ``world`` 1, the weight itself.

    Raises:
        ValueError: a rank outside the world, or an N that world does not divide.
    """
    _check_rank("shard_rows", rank, world)
    if weight.out_features % world:
        raise ValueError(
            f"shard_rows: out_features must be a multiple of the number of ranks, got {weight.out_features} and "
            f"{world} ranks; use a number of ranks that divides it, or keep the whole layer on each rank"
        )
    if world == 1:
        return weight
    rows = weight.out_features // world
    cut = {name: getattr(weight, name)[rank * rows : (rank + 1) * rows] for name in ("codes", "levels", "scales")}
    return _part(weight, cut, out_features=rows)


def shard_columns(weight: PackedWeight, rank: int, world: int) -> PackedWeight:
    """Columns ``rank * K / world`` to ``(rank + 1) * K / world - 1``: inputs of the layer. Values are exact.

    A cut must lie between two groups, as a group's levels and scale belong to all of its columns. Do not cut the weight
    of a layer with an ``input_order`` by columns: its columns are not in the order of the inputs.

    Args:
        weight: [N, K].
        rank: 0 to world - 1.
        world: ranks; K is a multiple of world * group_size.

    Returns:
        [N, K / world], contiguous copies. With ``world`` 1, the weight itself.

    Raises:
        ValueError: a rank outside the world, or a cut inside a group.
    """
    _check_rank("shard_columns", rank, world)
    if world == 1:
        return weight
    columns, rest = divmod(weight.in_features, world)
    if rest or columns % weight.group_size:
        raise ValueError(
            f"shard_columns: in_features must be a multiple of ranks * group_size, as a cut must lie between two "
            f"groups, got {weight.in_features}, {world} ranks and group_size {weight.group_size}; quantize this layer "
            f"with a smaller group_size, use another number of ranks, or keep the whole layer on each rank"
        )
    # A group of 32, 64 or 128 codes is a whole number of bytes for all bits.
    width = columns * weight.bits // 8
    groups = columns // weight.group_size
    cut = {name: getattr(weight, name)[:, rank * groups : (rank + 1) * groups] for name in ("levels", "scales")}
    cut["codes"] = weight.codes[:, rank * width : (rank + 1) * width]
    return _part(weight, cut, in_features=columns)


def shard_rotation(rotation: OnlineRotation | None, rank: int, world: int) -> OnlineRotation | None:
    """The part of an input rotation for the columns of :func:`shard_columns`.

    Args:
        rotation: of K entries, or None.
        rank: 0 to world - 1.
        world: ranks.

    Returns:
        The rotation of K / world entries, with its part of the signs. None for None.

    Raises:
        ValueError: a rank outside the world, or a rotation that mixes entries of several ranks.
    """
    _check_rank("shard_rotation", rank, world)
    if rotation is None or world == 1:
        return rotation
    # With heads, a run of group_size heads is mixed. Its entries are neighbours.
    block = rotation.group_size * (1 if rotation.heads is None else rotation.size // rotation.heads)
    size, rest = divmod(rotation.size, world)
    if rest or size % block:
        raise ValueError(
            f"shard_rotation: each block of the rotation must lie within one rank, got {rotation.size} entries on "
            f"{world} ranks and blocks of {block}; rotate in blocks that divide {rotation.size} / {world} (GSR's "
            f"blocks are the weight's group_size), or keep the whole layer on each rank"
        )
    heads = None if rotation.heads is None else rotation.heads // world
    signs = None if rotation.signs is None else rotation.signs[rank * size : (rank + 1) * size].clone()
    return OnlineRotation(size, rotation.group_size, rotation.order, heads, signs)


def _part(weight: PackedWeight, cut: dict[str, Tensor], **sizes: int) -> PackedWeight:
    # Copies, even of a contiguous slice, which would keep the whole tensor in memory.
    copies = {name: tensor.clone() if tensor.is_contiguous() else tensor.contiguous() for name, tensor in cut.items()}
    return replace(weight, **copies, **sizes)  # type: ignore[arg-type]


def _check_rank(caller: str, rank: int, world: int) -> None:
    if not 0 <= rank < world:
        raise ValueError(
            f"{caller}: rank must be 0 to ranks - 1, got rank {rank} of {world}; pass that of the process group"
        )
