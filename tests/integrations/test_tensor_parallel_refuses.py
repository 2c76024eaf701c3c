"""Slices of a packed weight and of a rotation for tensor parallelism, and their refusals."""

import pytest
import torch

from rcp_kernels import OnlineRotation
from rcp_kernels.bench.lut_linear import random_packed_weight
from rcp_kernels.nn.sharding import shard_columns, shard_rotation, shard_rows


def test_a_slice_of_one_row_keeps_no_more_memory_than_its_own():
    part = shard_columns(random_packed_weight(1, 128, 2, 32), 1, 4)
    assert part.codes.untyped_storage().nbytes() == 8


def test_slices_refuse():
    weight = random_packed_weight(6, 96, 2, 96)
    with pytest.raises(
        ValueError, match=r"multiple of ranks \* group_size.*got 96, 2 ranks and group_size 96; quantize"
    ):
        shard_columns(weight, 0, 2)
    with pytest.raises(ValueError, match=r"out_features must be a multiple of the number of ranks, got 6 and 4 ranks"):
        shard_rows(weight, 0, 4)
    for cut in (shard_rows, shard_columns):
        with pytest.raises(ValueError, match=r"rank must be 0 to ranks - 1, got rank 2 of 2"):
            cut(weight, 2, 2)


@pytest.mark.parametrize(
    "rotation",
    [
        OnlineRotation(96, 32),
        OnlineRotation(96, 4, "natural", heads=12),
        OnlineRotation(96, 16, "natural", signs=torch.tensor([1, -1, -1] * 32)),
    ],
)
def test_a_rotation_in_blocks_is_divided_with_the_columns(rotation):
    parts = [shard_rotation(rotation, rank, 3) for rank in range(3)]
    assert torch.equal(torch.block_diag(*[part.matrix() for part in parts]), rotation.matrix())
    assert shard_rotation(rotation, 0, 1) is rotation
    assert shard_rotation(None, 0, 3) is None


@pytest.mark.parametrize("rotation", [OnlineRotation(96), OnlineRotation(96, heads=8), OnlineRotation(80, 16)])
def test_a_rotation_across_ranks_is_refused(rotation):
    with pytest.raises(ValueError, match=rf"within one rank, got {rotation.size} entries on 2 ranks and blocks of"):
        shard_rotation(rotation, 0, 2)
