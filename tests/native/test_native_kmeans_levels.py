"""kmeans_levels of every ISA against Lloyd's algorithm written out in Python floats: bit for bit."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

ITERATIONS = 20


def lloyd(group, importance, count):
    """One group: the sums of each cluster as differences of running sums over the sorted weights, all in float64."""
    order = sorted(range(len(group)), key=lambda i: group[i])
    values = [float(group[i]) for i in order]
    mass = [1.0] * len(group) if importance is None else [float(importance[i]) for i in order]
    if not any(mass):
        mass = [1.0] * len(group)
    masses, moments = [0.0], [0.0]
    for m, value in zip(mass, values, strict=True):
        masses.append(masses[-1] + m)
        moments.append(moments[-1] + m * value)
    span = values[-1] - values[0]
    centers = []
    for c in range(count):
        position = (c + 0.5) / count
        centers.append(0.5 * (values[int(position * len(values))] + values[0] + span * position))
    edges = None
    for _ in range(ITERATIONS):
        bounds = [float(np.float32((a + b) * 0.5)) for a, b in itertools.pairwise(centers)]
        found = [0, *(sum(value < bound for value in values) for bound in bounds), len(values)]
        if found == edges:
            break
        edges = found
        for c, (begin, end) in enumerate(itertools.pairwise(edges)):
            inside = masses[end] - masses[begin]
            if inside <= 0:
                continue
            centers[c] = (moments[end] - moments[begin]) / inside
            if importance is not None:
                centers[c] = min(max(centers[c], values[min(begin, len(values) - 1)]), values[max(end - 1, 0)])
    return np.float32(centers)


def groups_of(seed, groups, length, exponent, distinct):
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((groups, length))
    if distinct:  # few values: many ties, empty clusters
        values = np.round(values * distinct) / distinct
    importance = rng.random((groups, length)) ** 4
    importance[rng.random((groups, length)) < 0.2] = 0.0
    importance[0] = 0.0
    return (values * 10.0**exponent).astype(np.float32), importance.astype(np.float32)


@given(
    seed=st.integers(0, 2**31),
    groups=st.integers(1, 40),
    length=st.integers(1, 70),
    exponent=st.integers(-42, 37),
    distinct=st.sampled_from([0, 1, 2]),
    count=st.sampled_from([2, 3, 4, 8, 16]),
    weighted=st.booleans(),
    threads=st.integers(1, 3),
)
def test_equals_python_on_every_isa(native, seed, groups, length, exponent, distinct, count, weighted, threads):
    values, importance = groups_of(seed, groups, length, exponent, distinct)
    expected = [lloyd(v, i if weighted else None, count) for v, i in zip(values, importance, strict=True)]
    for isa in range(min(native.isa_supported(), 2) + 1):
        levels, bad = native.kmeans_levels(values, importance if weighted else None, count, isa, threads)
        assert bad == groups
        np.testing.assert_array_equal(levels, expected)


@pytest.mark.parametrize("length", [128, 255, 256, 257, 1000])
@pytest.mark.parametrize("weighted", [False, True])
def test_long_groups(native, length, weighted):
    """Groups are sorted by a network up to 256 weights, by the standard library beyond."""
    values, importance = groups_of(0, 19, length, 0, 0)
    expected = [lloyd(v, i if weighted else None, 8) for v, i in zip(values, importance, strict=True)]
    for isa in range(min(native.isa_supported(), 2) + 1):
        levels, _ = native.kmeans_levels(values, importance if weighted else None, 8, isa, 2)
        np.testing.assert_array_equal(levels, expected)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1.0])
def test_reports_the_first_bad_group(native, value):
    good = np.ones((40, 33), np.float32)
    for first in (0, 17, 39):
        broken = good.copy()
        broken[[first, 39], [32, 0]] = value
        for isa in range(min(native.isa_supported(), 2) + 1):
            for threads in (1, 3):
                if value != -1:
                    assert native.kmeans_levels(broken, None, 4, isa, threads)[1] == first
                    assert native.clip_search(broken, None, 4, isa, threads)[1] == first
                assert native.kmeans_levels(good, broken, 4, isa, threads)[1] == first
                assert native.clip_search(good, broken, 4, isa, threads)[1] == first
    negative_zero = np.float32([[-0.0] * 5])
    assert native.kmeans_levels(np.ones((1, 5), np.float32), negative_zero, 4, 0, 1)[1] == 1
