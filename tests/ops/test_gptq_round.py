"""torch.ops.rcp_kernels.gptq_round against the reference, bit for bit. tests/methods/test_gptq.py tests its use."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rcp_kernels import ops
from rcp_kernels.ops import gptq_round


def problem(seed: int, rows: int, columns: int, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn((rows, columns), generator=generator)
    upper = torch.randn((columns, columns), generator=generator).mul_(0.1).triu_()
    upper.diagonal().copy_(torch.rand(columns, generator=generator) + 0.5)
    return block, upper, torch.randn((rows, levels), generator=generator).sort(-1).values


@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(0, 60),
    columns=st.integers(1, 140),
    cut=st.tuples(st.integers(0, 140), st.integers(0, 140)),
    levels=st.sampled_from([2, 4, 8, 16]),
)
def test_equals_the_reference(seed: int, rows: int, columns: int, cut: tuple[int, int], levels: int) -> None:
    first, last = sorted(min(each, columns) for each in cut)
    block, upper, table = problem(seed, rows, columns, levels)
    expected = block.clone()
    codes, errors = gptq_round(block, upper, table, first, last)
    for found, other in zip(
        (block, codes, errors),
        (expected, *ops.reference.gptq_round(expected, upper, table, first, last)),
        strict=True,
    ):
        assert torch.equal(found, other)


def test_a_block_is_columns_of_a_weight() -> None:
    weight, upper, table = problem(0, 40, 200, 8)
    whole = weight[:, 50:150].clone()
    expected = gptq_round(whole, upper[50:150, 50:150].contiguous(), table, 20, 60)
    outside = weight[:, :50].clone(), weight[:, 150:].clone()
    found = gptq_round(weight[:, 50:150], upper[50:150, 50:150], table, 20, 60)
    assert torch.equal(weight[:, 50:150], whole)
    assert torch.equal(weight[:, :50], outside[0])
    assert torch.equal(weight[:, 150:], outside[1])
    for each, other in zip(found, expected, strict=True):
        assert torch.equal(each, other)


def test_the_same_on_every_isa_and_with_any_threads() -> None:
    block, upper, table = problem(0, 500, 128, 8)
    threads, isa = torch.get_num_threads(), torch.ops.rcp_kernels.cpu_isa()
    results = []
    try:
        for level in range(min(torch.ops.rcp_kernels.cpu_isa_supported(), 2) + 1):
            for count in (1, 2, 4):
                torch.ops.rcp_kernels.set_cpu_isa(level)
                torch.set_num_threads(count)
                changed = block.clone()
                results.append((changed, *gptq_round(changed, upper, table, 32, 96)))
    finally:
        torch.set_num_threads(threads)
        torch.ops.rcp_kernels.set_cpu_isa(isa)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("function", [gptq_round, ops.reference.gptq_round])
def test_bad_arguments(function: Any) -> None:
    block, upper, table = problem(0, 6, 10, 4)
    with pytest.raises(ValueError, match=r"gptq_round: block must "):
        function(block[0], upper, table, 0, 4)
    with pytest.raises(ValueError, match=r"gptq_round: block must "):
        function(block.double(), upper, table, 0, 4)
    with pytest.raises(ValueError, match=r"gptq_round: upper must "):
        function(block, upper[:5], table, 0, 4)
    for strided in ((block.t().contiguous().t(), upper), (block, upper.t())):
        with pytest.raises(ValueError, match=r"must lie side by side, got strides"):
            function(*strided, table, 0, 4)
    for first, last in ((-1, 4), (4, 3), (0, 11)):
        with pytest.raises(ValueError, match=rf"got first {first}, last {last} of 10 columns"):
            function(block, upper, table, first, last)
    for wrong in (table[:5], table[:, :1], table[0], table.double(), torch.zeros(6, 17)):
        with pytest.raises(ValueError, match=r"gptq_round: table must "):
            function(block, upper, wrong, 0, 4)


def test_opcheck() -> None:
    block, upper, table = problem(0, 6, 40, 4)
    torch.library.opcheck(torch.ops.rcp_kernels.gptq_round.default, (block, upper, table, 3, 20))
