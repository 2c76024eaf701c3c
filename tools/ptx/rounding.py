"""Floating-point results with the one rounding that the PTX ISA asks for, where numpy would round twice.

A sum of two float64 is rounded to odd: the exact sum, truncated, with its last bit set if anything was cut off. That
keeps what a second rounding, to at most 51 bits, needs to be as if it were the only one.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np

__all__ = ["bfloat_bits", "bfloat_value", "flush", "fma32", "fma64", "odd_sum", "to_float32", "toward"]

U64, U32 = np.uint64, np.uint32


def odd_sum(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """float64 x + y, rounded to odd. Exact sums of products of float32 do not overflow."""
    total = np.asarray(x + y)
    rounded = total - x
    error = np.asarray((x - (total - rounded)) + (y - rounded))
    inexact = (error != 0) & np.isfinite(total) & (total.view(U64) & U64(1) == 0)
    if inexact.any():
        up = (error > 0) == (total > 0)
        bits = np.where(up, total.view(U64) + U64(1), total.view(U64) - U64(1))
        total = np.where(inexact, bits, total.view(U64)).view(np.float64)
    return total


def toward(value: np.ndarray, rounded: np.ndarray, mode: str) -> np.ndarray:
    """`rounded`, which is float64 `value` to nearest in a narrower dtype, made that of another rounding mode."""
    if mode == "rn":
        return rounded
    back = rounded.astype(np.float64)
    dtype = rounded.dtype.type
    too_large, too_small = back > value, back < value
    if mode == "rz":
        too_large, too_small = too_large & (value > 0), too_small & (value < 0)
    elif mode == "rm":
        too_small = np.zeros_like(too_small)
    elif mode == "rp":
        too_large = np.zeros_like(too_large)
    result = np.where(too_large, np.nextafter(rounded, dtype(-np.inf)), rounded)
    return np.where(too_small, np.nextafter(rounded, dtype(np.inf)), result)


def to_float32(value: np.ndarray, mode: str = "rn") -> np.ndarray:
    """float32 of a float64 that is exact or rounded to odd."""
    value = np.asarray(value)
    return toward(value, value.astype(np.float32), mode)


def fma32(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """float32 a * b + c, rounded to nearest once."""
    product = np.multiply(a, b, dtype=np.float64)
    total = product + c
    result = total.astype(np.float32)
    # Two roundings differ from one only if the first lands halfway between two float32, and it is inexact.
    halfway = total.view(U64) & U64(0x1FFF_FFFF) == U64(0x1000_0000)
    halfway |= np.abs(result) < np.float32(2.4e-38)
    if halfway.any():
        product, c, _ = np.broadcast_arrays(product, c, total)
        result[halfway] = odd_sum(product[halfway], c[halfway].astype(np.float64)).astype(np.float32)
    return result


def fma64(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """float64 a * b + c, rounded once: with fractions, one by one."""
    a, b, c = np.broadcast_arrays(a, b, c)
    result = np.array(a * b + c)
    for place in np.flatnonzero(np.isfinite(a) & np.isfinite(b) & np.isfinite(c)):
        exact = Fraction(float(a[place])) * Fraction(float(b[place])) + Fraction(float(c[place]))
        if exact:
            try:
                result[place] = float(exact)
            except OverflowError:
                result[place] = np.inf if exact > 0 else -np.inf
    return result


def flush(values: np.ndarray) -> np.ndarray:
    """Subnormal float32 become zeros of their sign."""
    tiny = np.abs(values) < np.float32(1.17549435e-38)
    return np.where(tiny, np.copysign(np.float32(0), values), values) if np.any(tiny) else values


def bfloat_value(bits: np.ndarray) -> np.ndarray:
    """float32 of bfloat16 bits (uint16)."""
    return (np.asarray(bits).astype(U32) << U32(16)).view(np.float32)


def bfloat_bits(values: np.ndarray, mode: str = "rn") -> np.ndarray:
    """uint16 bits of float32, or of float64 that is exact or rounded to odd; NaN becomes 0x7fff."""
    values = np.asarray(values)
    if values.dtype == np.float64:
        narrow = values.astype(np.float32)
        bits = narrow.view(U32)
        back = narrow.astype(np.float64)
        inexact = (back != values) & np.isfinite(narrow) & (bits & U32(1) == 0)
        away = np.abs(back) < np.abs(values)
        bits = np.where(inexact, np.where(away, bits + U32(1), bits - U32(1)), bits)
        # A value that overflows float32 is beyond every bfloat16: infinity to nearest, the largest towards zero.
    else:
        bits = values.view(U32)
    if mode == "rn":
        rounded = (bits + U32(0x7FFF) + ((bits >> U32(16)) & U32(1))) >> U32(16)
    elif mode == "rz":
        rounded = bits >> U32(16)
    else:
        raise ValueError(f"bfloat_bits: mode must be rn or rz, got {mode}")
    return np.where(np.isnan(values), U32(0x7FFF), rounded).astype(np.uint16)


def halves(function: Callable) -> Callable:
    """A function of float16 arrays as one of pairs of them in uint32."""

    def run(*operands: np.ndarray) -> np.ndarray:
        arrays = np.broadcast_arrays(*operands)
        return function(*[np.ascontiguousarray(array).view(np.float16) for array in arrays]).view(U32)

    return run
