"""quantize_activation of every ISA against numpy: integers and scales exactly."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import FLOAT_TYPES, quantize_activation, representable, to_bytes


def run(native, x, name, bits, clip, isa):
    tokens, columns = x.shape
    return native.quantize_activation(to_bytes(x, name), name, tokens, columns, bits, clip, isa)


@given(data=st.data())
def test_equals_numpy_on_every_isa(native, data):
    name = data.draw(st.sampled_from(FLOAT_TYPES))
    tokens, columns = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 200))
    bits, clip = data.draw(st.sampled_from([4, 8])), data.draw(st.sampled_from([1.0, 0.9, 0.25, 1e-6]))
    seed, exponent = data.draw(st.integers(0, 2**31)), data.draw(st.integers(-37, 4))
    x = np.random.default_rng(seed).standard_normal((tokens, columns)) * 10.0**exponent
    x = representable(x.astype(np.float32), name)
    expected, scale = quantize_activation(x, bits, np.float32(clip))
    for isa in range(min(native.isa_supported(), 2) + 1):
        q, scales, sums, finite = run(native, x, name, bits, clip, isa)
        assert finite
        np.testing.assert_array_equal(q, expected)
        np.testing.assert_array_equal(scales, scale)
        np.testing.assert_array_equal(sums, expected.sum(axis=1))


def test_ties_go_to_even(native):
    x = np.float32([[7, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 6.5, -6.5, 3.4999998, 0, -0.0, 7, -7]])
    expected = [[7, 0, 2, 2, 0, -2, -2, 6, -6, 3, 0, 0, 7, -7]]
    for isa in range(min(native.isa_supported(), 2) + 1):
        np.testing.assert_array_equal(run(native, x, "float32", 4, 1.0, isa)[0], expected)


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-40, 2.0**-121, 2.0**-117, 3.4e38])
def test_vanishing_and_huge_tokens(native, value):
    """Tokens of zeros, subnormals, at the 2**-120 edge and near overflow: finite, and as the reference says."""
    x = np.float32([[value, -value / 2, 0.0, value / 3]])
    for bits in (4, 8):
        expected, scale = quantize_activation(x, bits, np.float32(1))
        for isa in range(min(native.isa_supported(), 2) + 1):
            q, scales, _, finite = run(native, x, "float32", bits, 1.0, isa)
            assert finite
            assert np.isfinite(scales).all()
            np.testing.assert_array_equal(q, expected)
            np.testing.assert_array_equal(scales, scale)


@pytest.mark.parametrize("name", FLOAT_TYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_flags_what_is_not_finite(native, name, bad):
    for columns in (1, 15, 16, 17, 33):
        for at in {0, columns - 1}:
            x = np.ones((1, columns), np.float32)
            x[0, at] = bad
            for isa in range(min(native.isa_supported(), 2) + 1):
                assert not run(native, x, name, 8, 1.0, isa)[3]


def test_pack_nibbles(native):
    for n in range(9):
        q = np.arange(-8, -8 + n, dtype=np.int8)
        expected = np.zeros((n + 1) // 2, np.uint8)
        for i, value in enumerate(q):
            expected[i // 2] |= (int(value) & 15) << (4 * (i % 2))
        np.testing.assert_array_equal(native.pack_nibbles(q), expected)
