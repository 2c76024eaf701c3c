"""Software conversions of float16 and bfloat16, over all 65536 values and the edges between them."""

import numpy as np
from reference import from_bytes


def neighbours_of_ties(name: str) -> np.ndarray:
    """float32 values at, just below and just above every midpoint between adjacent values of the type."""
    with np.errstate(invalid="ignore"):  # among them are signalling NaNs
        grid = np.sort(from_bytes(np.arange(65536, dtype=np.uint16).view(np.uint8), name).astype(np.float64))
    grid = np.unique(grid[np.isfinite(grid)])
    middle = ((grid[1:] + grid[:-1]) / 2).astype(np.float32)
    return np.concatenate([middle, np.nextafter(middle, np.float32(np.inf)), np.nextafter(middle, np.float32(-np.inf))])


def test_half_to_float_all_values(native):
    halves = np.arange(65536, dtype=np.uint16)
    expected = halves.view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(native.half_to_float(halves), expected)


def test_float_to_half_rounds_to_nearest_even(native):
    values = np.concatenate(
        [neighbours_of_ties("float16"), np.float32([0, -0.0, 65519.99, 65520, -65520, 1e30, np.inf, -np.inf, 1e-30])]
    )
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16).view(np.uint16)
    np.testing.assert_array_equal(native.float_to_half(values), expected)
    assert np.isnan(native.half_to_float(native.float_to_half(np.float32([np.nan, -np.nan])))).all()


def test_bfloat_round_trip_all_values(native):
    words = np.arange(65536, dtype=np.uint16)
    floats = native.bfloat_to_float(words)
    np.testing.assert_array_equal(floats.view(np.uint32), words.astype(np.uint32) << 16)
    finite = ~np.isnan(floats)
    np.testing.assert_array_equal(native.float_to_bfloat(floats)[finite], words[finite])
    assert np.isnan(native.bfloat_to_float(native.float_to_bfloat(floats[~finite]))).all()


def test_float_to_bfloat_rounds_to_nearest_even(native):
    values = neighbours_of_ties("bfloat16")
    low = (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32).astype(np.float64)
    away = (values.view(np.uint32) & np.uint32(0xFFFF0000)).astype(np.uint64) + 0x10000
    high = away.astype(np.uint32).view(np.float32).astype(np.float64)
    below, above = np.abs(values - low), np.abs(high - values)
    even = (away.astype(np.uint32) >> 16) % 2 == 0
    expected = np.where((above < below) | ((above == below) & even), high, low)
    np.testing.assert_array_equal(native.bfloat_to_float(native.float_to_bfloat(values)), expected.astype(np.float32))
