"""nearest_codes of every ISA against numpy, and the bit stream against one bit at a time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st


def codes_of(weight, table, group_size):
    midpoints = table[..., 1:] * np.float32(0.5) + table[..., :-1] * np.float32(0.5)
    each = np.repeat(midpoints, group_size, axis=1)[:, : weight.shape[1]]
    return (weight[..., None] > each).sum(-1).astype(np.uint8)


def stream_of(codes, group_size, bits):
    rows, columns = codes.shape
    padded = -(-columns // group_size) * group_size
    packed = np.zeros((rows, (padded * bits + 7) // 8), np.uint8)
    for row in range(rows):
        for k in range(columns):
            for b in range(bits):
                at = k * bits + b
                packed[row, at // 8] |= ((codes[row, k] >> b) & 1) << (at % 8)
    return packed


@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 5),
    columns=st.integers(1, 150),
    group_size=st.sampled_from([32, 64, 128, 0]),
    bits=st.sampled_from([2, 3, 4]),
    ties=st.booleans(),
    threads=st.integers(1, 3),
)
def test_equals_numpy_on_every_isa(native, seed, rows, columns, group_size, bits, ties, threads):
    group_size = group_size or columns
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((rows, columns)).astype(np.float32)
    table = np.sort(rng.standard_normal((rows, -(-columns // group_size), 2**bits)).astype(np.float32))
    if ties:  # weights midway between two levels, and equal levels
        weight, table = np.round(weight), np.round(table * 2)
    expected = codes_of(weight, table, group_size)
    for isa in range(min(native.isa_supported(), 2) + 1):
        plain = native.nearest_codes(weight, table, group_size, bits, False, isa, threads)
        np.testing.assert_array_equal(plain, expected)
        packed = native.nearest_codes(weight, table, group_size, bits, True, isa, threads)
        np.testing.assert_array_equal(packed, stream_of(expected, group_size, bits))


@pytest.mark.parametrize("magnitude", [1e-45, 1e-38, 3.4e38])
def test_any_magnitude(native, magnitude):
    weight = np.float32(np.linspace(-1, 1, 33)[None]) * np.float32(magnitude)
    table = np.float32([[[-1, -1 / 3, 1 / 3, 1]]]) * np.float32(magnitude)
    for isa in range(min(native.isa_supported(), 2) + 1):
        codes = native.nearest_codes(weight, table, 33, 2, False, isa, 1)
        np.testing.assert_array_equal(codes, codes_of(weight, table, 33))
