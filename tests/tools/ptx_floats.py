"""Floats of every format as exact fractions, and operands to try."""

import math
from fractions import Fraction

import numpy as np

RANDOM = np.random.default_rng(5)
# digits, smallest and largest exponent of normal numbers
FORMATS = {"f16": (11, -14, 15), "bf16": (8, -126, 127), "f32": (24, -126, 127), "f64": (53, -1022, 1023)}
DTYPES = {"f16": "uint16", "bf16": "uint16", "f32": "uint32", "f64": "uint64"}


def rounded(value: Fraction, name: str, mode: str = "rn", negative_zero: bool = False) -> float:
    """An exact value in a format. Every float of these formats is a float64."""
    digits, low, high = FORMATS[name]
    if value == 0:
        return -0.0 if negative_zero else 0.0
    sign, value = (-1 if value < 0 else 1), abs(value)
    exponent = value.numerator.bit_length() - value.denominator.bit_length()
    exponent -= value < Fraction(2) ** exponent
    exponent = max(exponent, low)
    unit = Fraction(2) ** (exponent - digits + 1)
    steps = value / unit
    whole = steps.numerator // steps.denominator
    rest = steps - whole
    up = {
        "rn": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2 == 1),
        "rz": False,
        "rp": rest > 0 and sign > 0,
        "rm": rest > 0 and sign < 0,
    }[mode]
    result = (whole + up) * unit
    if result >= Fraction(2) ** (high + 1):
        largest = (2 - Fraction(2) ** (1 - digits)) * Fraction(2) ** high
        finite = mode == "rz" or (mode == "rp" and sign < 0) or (mode == "rm" and sign > 0)
        return sign * (float(largest) if finite else math.inf)
    return math.copysign(float(result), sign)


def value_of(bits: int, name: str) -> float:
    if name == "f16":
        return float(np.uint16(bits).view(np.float16))
    if name == "bf16":
        return float((np.uint32(bits) << np.uint32(16)).view(np.float32))
    return float(np.array(bits, DTYPES[name]).view({"f32": np.float32, "f64": np.float64}[name]))


def operands(name: str, count: int, size: int = 400) -> list[np.ndarray]:
    """Bits of operands: all kinds of edges, anything at all, and ones near each other, whose sums cancel."""
    bits = 8 * np.dtype(DTYPES[name]).itemsize
    digits = FORMATS[name][0]
    infinity = ((1 << (bits - digits)) - 1) << (digits - 1)
    one = int(
        np.array(1.0, {"f16": "f2", "f32": "f4", "f64": "f8"}.get(name, "f4")).view(
            DTYPES[name] if name != "bf16" else "u4"
        )
    )
    one >>= 16 if name == "bf16" else 0
    positive = [0, 1, 2, (1 << (digits - 1)) - 1, 1 << (digits - 1), one, one + 1, one - 1, infinity - 1, infinity]
    edges = [*positive, *(value | 1 << (bits - 1) for value in positive), infinity + 1, infinity | 1 << (digits - 2)]
    columns = []
    for _ in range(count):
        anything = RANDOM.integers(0, 1 << bits, size, dtype=np.uint64)
        near = one + RANDOM.integers(-(4 << digits), 4 << digits, size)
        near = np.where(RANDOM.random(size) < 0.5, near, near + (1 << (bits - 1)) % (1 << 63)).astype(np.uint64)
        edge = RANDOM.choice(np.array(edges, np.uint64), size)
        choice = RANDOM.integers(0, 4, size)
        columns.append(np.select([choice == 0, choice == 1], [edge, anything], near).astype(DTYPES[name]))
    return columns


def same(found: int, wanted: float, name: str) -> bool:
    value = value_of(found, name)
    if math.isnan(wanted):
        return math.isnan(value)
    return value == wanted and math.copysign(1, value) == math.copysign(1, wanted)
