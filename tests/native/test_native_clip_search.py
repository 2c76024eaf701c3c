"""clip_search of every ISA against the search written out in numpy, one group at a time: the very ratios."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

RATIOS = [np.float32((99 - 3 * i) / 100) for i in range(24)]


def search(group, importance, count):
    scale = math.frexp(float(np.abs(group).max()))[1]
    values = np.ldexp(group.astype(np.float64), -scale).astype(np.float32)
    low, high = values.min(), values.max()
    last = np.float32(count - 1)

    def error(ratio_low, ratio_high):
        first = low * ratio_low
        step = np.maximum(high * ratio_high - first, np.float32(0)) / last
        inverse = np.float32(1) / step if step > 0 else np.float32(0)
        codes = np.clip(np.rint((values - first) * inverse), 0, last)
        miss = (codes * step + first - values).astype(np.float64)
        total = 0.0
        for square, weight in zip(miss * miss, importance, strict=True):
            total += float(square) * float(weight)
        return total

    best = [RATIOS[0], RATIOS[0]]
    least = error(*best)
    for moves in ((True, True), (True, False), (False, True)):
        fixed = list(best)
        for ratio in RATIOS:
            tried = [ratio if move else kept for move, kept in zip(moves, fixed, strict=True)]
            found = error(*tried)
            if found < least:
                least = found
                best = tried
    return best


@given(
    seed=st.integers(0, 2**31),
    groups=st.integers(1, 20),
    length=st.integers(1, 40),
    exponent=st.integers(-42, 37),
    shift=st.sampled_from([0.0, 3.0, -3.0]),
    count=st.sampled_from([2, 4, 8, 16]),
    weighted=st.booleans(),
    threads=st.integers(1, 3),
)
def test_equals_numpy_on_every_isa(native, seed, groups, length, exponent, shift, count, weighted, threads):
    rng = np.random.default_rng(seed)
    values = ((rng.standard_normal((groups, length)) + shift) * 10.0**exponent).astype(np.float32)
    values[0] = values[0, 0]
    importance = (rng.random((groups, length)) ** 4).astype(np.float32)
    ones = np.ones_like(importance)
    expected = [search(v, i, count) for v, i in zip(values, importance if weighted else ones, strict=True)]
    for isa in range(min(native.isa_supported(), 2) + 1):
        ratios, bad = native.clip_search(values, importance if weighted else None, count, isa, threads)
        assert bad == groups
        np.testing.assert_array_equal(ratios, expected)


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, 1.0, -1.0, 3.4e38])
def test_equal_weights_get_a_ratio(native, value):
    values = np.full((3, 32), value, np.float32)
    for isa in range(min(native.isa_supported(), 2) + 1):
        ratios, _ = native.clip_search(values, None, 8, isa, 1)
        assert set(ratios.ravel()) <= set(RATIOS)
        np.testing.assert_array_equal(ratios, [search(v, np.ones(32), 8) for v in values])
