"""torch.ops.rcp_kernels.clip_search against the reference, the very ratios; and what the search has to hold."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rcp_kernels import ops
from rcp_kernels.ops import clip_search
from rcp_kernels.ops.clip_search import CLIP_RATIOS


def random_groups(
    seed: int, groups: int, length: int, magnitude: float, shift: float, weighted: bool
) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn((groups, length), generator=generator, dtype=torch.float64) + shift
    values[:1] = values[:1, :1]  # a constant group
    importance = torch.rand((groups, length), generator=generator).pow(4)
    importance[1:2] = 0.0
    return (values * magnitude).float(), importance if weighted else None


drawn_groups = st.builds(
    lambda seed, groups, length, exponent, shift, weighted: random_groups(
        seed, groups, length, 10.0**exponent, shift, weighted
    ),
    seed=st.integers(0, 2**31),
    groups=st.integers(0, 40),
    length=st.integers(1, 130),
    exponent=st.integers(-42, 37),
    shift=st.sampled_from([0.0, 3.0, -3.0]),
    weighted=st.booleans(),
)


def squared_error(groups: Tensor, ratios: Tensor, count: int, importance: Tensor | None) -> Tensor:
    """The error of each group in float64, with every weight on the nearest of evenly spaced levels."""
    wide = groups.double()
    low, high = wide.amin(1) * ratios[:, 0].double(), wide.amax(1) * ratios[:, 1].double()
    high = torch.maximum(low, high)
    levels = low[:, None] + (high - low)[:, None] * torch.linspace(0, 1, count, dtype=torch.float64)
    error = (wide[..., None] - levels[:, None]).square().amin(-1)
    return (error if importance is None else error * importance.double()).sum(1)


@given(drawn_groups, st.sampled_from([2, 4, 8, 16]))
def test_equals_the_reference(drawn: tuple[Tensor, Tensor | None], count: int) -> None:
    groups, importance = drawn
    assert torch.equal(clip_search(groups, count, importance), ops.reference.clip_search(groups, count, importance))


@given(drawn_groups, st.sampled_from([2, 4, 8]))
def test_never_worse_than_the_whole_range_or_any_common_ratio(drawn: tuple[Tensor, Tensor | None], count: int) -> None:
    groups, importance = drawn
    ratios = clip_search(groups, count, importance)
    assert set(ratios.flatten().tolist()) <= set(torch.tensor(CLIP_RATIOS).tolist())
    found = squared_error(groups, ratios, count, importance)
    # The search computes levels in float32: 2**-22 of the largest magnitude, or the smallest subnormal number.
    mass = torch.ones(groups.shape) if importance is None else importance
    total = mass.double().sum(1)
    rounding = groups.double().abs().amax(1) * 2.0**-21 if groups.shape[0] else total
    for ratio in CLIP_RATIOS:
        other = squared_error(groups, torch.full_like(ratios, ratio), count, importance)
        slack = 4 * (other * total).sqrt() * rounding + 4 * total * rounding.square()
        assert bool((found <= other + slack).all())


def test_a_power_of_two_changes_nothing() -> None:
    groups, importance = random_groups(0, 50, 64, 1.0, 0.0, True)
    expected = clip_search(groups, 8, importance)
    for exponent in (-100, -20, 1, 100):
        assert torch.equal(clip_search(torch.ldexp(groups, torch.tensor(exponent)), 8, importance), expected)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_same_on_every_isa_and_with_any_threads(weighted: bool) -> None:
    groups, importance = random_groups(0, 1000, 64, 0.02, 0.0, weighted)
    threads, isa = torch.get_num_threads(), torch.ops.rcp_kernels.cpu_isa()
    results = []
    try:
        for level in range(min(torch.ops.rcp_kernels.cpu_isa_supported(), 2) + 1):
            for count in (1, 2, 4):
                torch.ops.rcp_kernels.set_cpu_isa(level)
                torch.set_num_threads(count)
                results.append(clip_search(groups, 8, importance))
    finally:
        torch.set_num_threads(threads)
        torch.ops.rcp_kernels.set_cpu_isa(isa)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("function", [clip_search, ops.reference.clip_search])
def test_bad_arguments(function: Any) -> None:
    groups = torch.randn(5, 8)
    broken = groups.clone()
    broken[3, 7] = float("nan")
    with pytest.raises(ValueError, match=r"clip_search: groups must be finite.* group 3 "):
        function(broken, 4)
    with pytest.raises(ValueError, match=r"importance finite and at least 0, but group 0 "):
        function(groups, 4, groups.abs() - 10)
    with pytest.raises(ValueError, match=r"count must be between 2 and 256 levels, got 1;"):
        function(groups, 1)
    with pytest.raises(ValueError, match=r"groups"):
        function(groups.double(), 4)


@pytest.mark.parametrize("weighted", [False, True])
def test_opcheck(weighted: bool) -> None:
    groups, importance = random_groups(0, 7, 20, 1.0, 0.0, weighted)
    torch.library.opcheck(torch.ops.rcp_kernels.clip_search.default, (groups, 4, importance))
