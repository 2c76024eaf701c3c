"""torch.ops.rcp_kernels.kmeans_levels against the reference, bit for bit; and what k-means has to hold."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rcp_kernels import ops
from rcp_kernels.ops import kmeans_levels

groups_and_importance = st.builds(
    lambda seed, groups, length, exponent, distinct, weighted: random_groups(
        seed, groups, length, 10.0**exponent, distinct, weighted
    ),
    seed=st.integers(0, 2**31),
    groups=st.integers(0, 40),
    length=st.integers(1, 130),
    exponent=st.integers(-42, 37),
    distinct=st.sampled_from([0, 1, 2]),
    weighted=st.booleans(),
)


def random_groups(
    seed: int, groups: int, length: int, magnitude: float, distinct: int, weighted: bool
) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn((groups, length), generator=generator, dtype=torch.float64)
    if distinct:  # few values: many ties, constant groups, empty clusters
        values = (values * distinct).round() / distinct
    importance = torch.rand((groups, length), generator=generator).pow(4)
    importance[torch.rand((groups, length), generator=generator) < 0.2] = 0.0
    importance[:1] = 0.0
    return (values * magnitude).float(), importance if weighted else None


def squared_error(groups: Tensor, levels: Tensor, importance: Tensor | None) -> Tensor:
    """The error of each group in float64, with every weight on its nearest level."""
    nearest = (groups.double()[..., None] - levels.double()[:, None]).square().amin(-1)
    if importance is not None:
        mass = importance.double()
        nearest = nearest * torch.where((mass > 0).any(1, keepdim=True), mass, 1.0)
    return nearest.sum(1)


@given(groups_and_importance, st.sampled_from([2, 3, 4, 8, 16]))
def test_equals_the_reference(drawn: tuple[Tensor, Tensor | None], count: int) -> None:
    groups, importance = drawn
    assert torch.equal(kmeans_levels(groups, count, importance), ops.reference.kmeans_levels(groups, count, importance))


@given(groups_and_importance, st.sampled_from([2, 4, 8]))
def test_never_worse_than_the_start(drawn: tuple[Tensor, Tensor | None], count: int) -> None:
    groups, importance = drawn
    if groups.shape[0] == 0:
        return
    levels = kmeans_levels(groups, count, importance)
    assert bool((levels.diff(dim=1) >= 0).all())
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    assert bool(((levels >= low) & (levels <= high)).all())
    ordered = groups.sort(1).values.double()
    position = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    median = ordered[:, (position * groups.shape[1]).long()]
    start = 0.5 * (median + ordered[:, :1] + (ordered[:, -1:] - ordered[:, :1]) * position)
    before, after = squared_error(groups, start, importance), squared_error(groups, levels, importance)
    # Levels are rounded to float32, by 2**-24 of the largest magnitude or the smallest subnormal number.
    rounding = groups.double().abs().amax(1) * 2.0**-24 + 2.0**-149
    mass = torch.ones(groups.shape) if importance is None else importance
    total = torch.where((mass > 0).any(1, keepdim=True), mass.double(), 1.0).sum(1)
    slack = 2 * (before * total).sqrt() * rounding + total * rounding.square()
    assert bool((after <= before * (1 + 1e-9) + slack).all())


def test_importance_takes_the_levels_to_what_counts() -> None:
    groups = torch.tensor([[0.0, 1.0, 10.0, 11.0, 20.0]])
    alone = kmeans_levels(groups, 2, torch.tensor([[1.0, 1.0, 0.0, 0.0, 1e-6]]))
    torch.testing.assert_close(alone, torch.tensor([[0.5, 20.0]]))
    # A cluster of no importance keeps the level it started from.
    kept = kmeans_levels(groups, 4, torch.tensor([[1.0, 1.0, 0.0, 0.0, 1.0]]))
    assert torch.equal(kept[0, [0, 3]], torch.tensor([0.5, 20.0]))
    assert bool((kept.diff(dim=1) >= 0).all())
    none = kmeans_levels(groups, 2, torch.zeros(1, 5))
    assert torch.equal(none, kmeans_levels(groups, 2))


@pytest.mark.parametrize("weighted", [False, True])
def test_the_same_on_every_isa_and_with_any_threads(weighted: bool) -> None:
    groups, importance = random_groups(0, 3000, 64, 0.02, 0, weighted)
    threads, isa = torch.get_num_threads(), torch.ops.rcp_kernels.cpu_isa()
    results = []
    try:
        for level in range(min(torch.ops.rcp_kernels.cpu_isa_supported(), 2) + 1):
            for count in (1, 2, 4):
                torch.ops.rcp_kernels.set_cpu_isa(level)
                torch.set_num_threads(count)
                results.append(kmeans_levels(groups, 8, importance))
    finally:
        torch.set_num_threads(threads)
        torch.ops.rcp_kernels.set_cpu_isa(isa)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_strides_do_not_matter() -> None:
    groups, importance = random_groups(0, 40, 33, 1.0, 0, True)
    assert importance is not None
    expected = kmeans_levels(groups, 4, importance)
    assert torch.equal(kmeans_levels(groups.t().contiguous().t(), 4, importance.repeat(1, 2)[:, :33]), expected)
    row = importance[1:2].expand(40, 33)
    assert torch.equal(kmeans_levels(groups, 4, row), kmeans_levels(groups, 4, row.contiguous()))


@pytest.mark.parametrize("function", [kmeans_levels, ops.reference.kmeans_levels])
def test_bad_arguments(function: Any) -> None:
    groups = torch.randn(5, 8)
    for bad in (float("nan"), float("inf"), -float("inf")):
        broken = groups.clone()
        broken[3, 7] = bad
        with pytest.raises(ValueError, match=r"kmeans_levels: groups must be finite.* group 3 "):
            function(broken, 4)
        with pytest.raises(ValueError, match=r"kmeans_levels: .*importance finite.* group 3 "):
            function(groups, 4, broken.abs())
    with pytest.raises(ValueError, match=r"importance finite and at least 0, but group 0 "):
        function(groups, 4, groups.abs() - 10)
    with pytest.raises(ValueError, match=r"groups .*got .*\[?5, 0\]?"):
        function(groups[:, :0], 4)
    with pytest.raises(ValueError, match=r"groups"):
        function(groups.double(), 4)
    with pytest.raises(ValueError, match=r"groups"):
        function(groups[0], 4)
    for count in (1, 257):
        with pytest.raises(ValueError, match=rf"count must be between 2 and 256 levels, got {count};"):
            function(groups, count)
    with pytest.raises(ValueError, match=r"importance must"):
        function(groups, 4, groups[:3].abs())


@pytest.mark.parametrize("weighted", [False, True])
def test_opcheck(weighted: bool) -> None:
    groups, importance = random_groups(0, 7, 20, 1.0, 0, weighted)
    torch.library.opcheck(torch.ops.rcp_kernels.kmeans_levels.default, (groups, 4, importance))


@pytest.mark.parametrize("op", ["kmeans_levels", "clip_search", "nearest_codes", "gptq_round"])
def test_other_devices_run_the_reference(op: str) -> None:
    keys = ("CUDA", "XPU", "PrivateUse1")
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"rcp_kernels::{op}", "CPU")
    assert all(torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"rcp_kernels::{op}", key) for key in keys)
