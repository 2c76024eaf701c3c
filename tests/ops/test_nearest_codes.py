"""torch.ops.rcp_kernels.nearest_codes against the reference and against distances in float64."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rcp_kernels import ops
from rcp_kernels.formats import unpack_codes
from rcp_kernels.ops import nearest_codes


def problem(seed: int, rows: int, columns: int, group_size: int, bits: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn((rows, columns), generator=generator)
    table = torch.randn((rows, -(-columns // group_size), 2**bits), generator=generator).sort(-1).values
    return weight, table


@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(0, 9),
    columns=st.integers(1, 300),
    group_size=st.sampled_from([32, 64, 128, 0]),
    bits=st.sampled_from([2, 3, 4]),
)
def test_equals_the_reference(seed: int, rows: int, columns: int, group_size: int, bits: int) -> None:
    group_size = group_size or columns
    weight, table = problem(seed, rows, columns, group_size, bits)
    codes = nearest_codes(weight, table, group_size)
    assert torch.equal(codes, ops.reference.nearest_codes(weight, table, group_size))
    packed = nearest_codes(weight, table, group_size, packed=True)
    assert torch.equal(packed, ops.reference.nearest_codes(weight, table, group_size, packed=True))
    assert torch.equal(unpack_codes(packed, columns, bits, group_size), codes)
    each = table.repeat_interleave(group_size, 1)[:, :columns]
    distance = (weight.double()[..., None] - each.double()).abs()
    chosen = distance.gather(-1, codes.long()[..., None]).squeeze(-1)
    assert bool((chosen <= distance.amin(-1) + 1e-6).all())


def test_a_tie_takes_the_lower_level_and_any_group_size_goes_unpacked() -> None:
    table = torch.tensor([-3.0, -1.0, 1.0, 3.0]).expand(1, 2, 4)
    weight = torch.tensor([[-2.0, 0.0, 2.0, 1.9, 2.1, float("nan")]])
    assert nearest_codes(weight, table, 3).tolist() == [[0, 1, 2, 2, 3, 0]]
    assert nearest_codes(weight, table[:, :1], 10**6).tolist() == [[0, 1, 2, 2, 3, 0]]


@pytest.mark.parametrize("function", [nearest_codes, ops.reference.nearest_codes])
def test_bad_arguments(function: Any) -> None:
    weight, table = problem(0, 3, 70, 32, 2)
    for wrong in (weight[0], weight[:, :0], weight.double()):
        with pytest.raises(ValueError, match=r"nearest_codes: weight must "):
            function(wrong, table, 32)
    for other in (table[:2], table[:, :2], table[..., :3], table.double(), table[0]):
        with pytest.raises(ValueError, match=r"nearest_codes: table must "):
            function(weight, other, 32)
    with pytest.raises(ValueError, match=r"group_size must be at least 1, got 0;"):
        function(weight, table, 0)
    with pytest.raises(ValueError, match=r"nearest_codes: group_size must be .*got 30;"):
        function(weight, table, 30, True)


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(packed: bool) -> None:
    weight, table = problem(0, 3, 70, 32, 3)
    torch.library.opcheck(torch.ops.rcp_kernels.nearest_codes.default, (weight, table, 32, packed))
