"""walsh_transform of every ISA against dense float64 products of matrices built here, from their definitions."""

import functools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import FLOAT_TYPES, from_bytes, representable, to_bytes


@functools.cache
def sylvester(n: int) -> np.ndarray:
    """Natural order: entry (i, j) is (-1) ** popcount(i & j)."""
    matrix = np.ones((1, 1))
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def sequency_order(matrix: np.ndarray) -> np.ndarray:
    """Rows by their number of sign changes, ties by index."""
    return np.argsort((np.diff(matrix, axis=1) != 0).sum(axis=1), kind="stable").astype(np.int32)


@functools.cache
def paley(m: int) -> np.ndarray:
    """A Hadamard matrix of order m = prime + 1, prime = 3 mod 4: not symmetric, so that transposes show."""
    prime = m - 1
    residues = {i * i % prime for i in range(1, prime)}
    symbol = np.array([0] + [1 if i in residues else -1 for i in range(1, prime)])
    jacobsthal = symbol[(np.arange(prime)[:, None] - np.arange(prime)[None, :]) % prime]
    skew = np.block([[np.zeros((1, 1)), np.ones((1, prime))], [-np.ones((prime, 1)), jacobsthal]])
    matrix = skew + np.eye(m)
    assert (matrix @ matrix.T == m * np.eye(m)).all()
    return matrix


def run(native, x, name, n, isa, base=None, permutation=None, scale=1.0, inverse=False, threads=1, in_place=False):
    m = 1 if base is None else len(base)
    raw = native.walsh_transform(
        to_bytes(x, name), name, x.size // n, n, m, base, permutation, scale, inverse, isa, threads, in_place
    )
    return from_bytes(raw, name).reshape(x.shape)


def check(native, matrix, x, name, n, base, permutation, scale, inverse):
    dense = matrix if permutation is None else matrix[permutation]
    dense = dense.T if inverse else dense
    expected = x.astype(np.float64).reshape(-1, n) @ dense.T * scale
    bound = 2e-6 * np.abs(x).reshape(-1, n).sum(axis=1, keepdims=True) * scale
    bound = bound + {"float32": 0, "float16": 2.0**-11, "bfloat16": 2.0**-8}[name] * np.abs(expected) + 1e-7
    first = None
    for isa in range(min(native.isa_supported(), 2) + 1):
        y = run(native, x, name, n, isa, base, permutation, scale, inverse)
        assert (np.abs(y.reshape(-1, n) - expected) <= bound).all(), (isa, n)
        first = y if first is None else first
        np.testing.assert_array_equal(y, first, err_msg=f"isa {isa} differs from the plain path")
        in_place = run(native, x, name, n, isa, base, permutation, scale, inverse, threads=3, in_place=True)
        np.testing.assert_array_equal(in_place, y)


@given(
    bits=st.integers(0, 11),
    blocks=st.sampled_from([0, 1, 2, 3, 5, 17]),
    sequency=st.booleans(),
    inverse=st.booleans(),
    name=st.sampled_from(FLOAT_TYPES),
    seed=st.integers(0, 2**31),
)
def test_powers_of_two(native, bits, blocks, sequency, inverse, name, seed):
    n = 1 << bits
    x = representable(np.random.default_rng(seed).standard_normal((blocks, n)).astype(np.float32), name)
    order = sequency_order(sylvester(n)) if sequency else None
    check(native, sylvester(n), x, name, n, None, order, np.float32(n**-0.5), inverse)


@pytest.mark.parametrize("bits", [12, 13, 14, 15])
@pytest.mark.parametrize("sequency", [False, True])
def test_large_powers_of_two(native, bits, sequency):
    """Against a float64 butterfly: the dense matrix of 32768 would fill this machine."""
    n = 1 << bits
    x = np.random.default_rng(bits).standard_normal((2, n)).astype(np.float32)
    expected = x.astype(np.float64)
    for stride in (1 << b for b in range(bits)):
        pairs = expected.reshape(2, -1, 2, stride)
        expected = np.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], axis=2).reshape(2, n)
    order = None
    if sequency:
        s = np.arange(n)
        reverse = [int(format(g, f"0{bits}b")[::-1], 2) for g in s ^ (s >> 1)]
        order = np.array(reverse, np.int32)
        expected = expected[:, order]
    for isa in range(min(native.isa_supported(), 2) + 1):
        y = run(native, x, "float32", n, isa, permutation=order)
        assert np.abs(y - expected).max() <= 1e-6 * np.abs(x).sum(axis=1).max()


@given(
    m=st.sampled_from([12, 20]),
    bits=st.integers(0, 6),
    blocks=st.integers(0, 3),
    sequency=st.booleans(),
    inverse=st.booleans(),
    name=st.sampled_from(FLOAT_TYPES),
    seed=st.integers(0, 2**31),
)
def test_sizes_with_a_dense_factor(native, m, bits, blocks, sequency, inverse, name, seed):
    n = m << bits
    matrix = np.kron(paley(m), sylvester(1 << bits))
    x = representable(np.random.default_rng(seed).standard_normal((blocks, n)).astype(np.float32), name)
    order = sequency_order(matrix) if sequency else None
    base = paley(m).astype(np.float32)
    check(native, matrix, x, name, n, base, order, np.float32(n**-0.5), inverse)


def test_subnormals_are_flushed_and_the_mode_comes_back(native):
    tiny = np.full((1, 64), 1e-40, np.float32)
    for isa in range(min(native.isa_supported(), 2) + 1):
        assert (run(native, tiny, "float32", 64, isa) == 0).all()
        # numpy's own arithmetic in this thread still knows subnormals.
        assert np.float32(1e-40) * np.float32(0.5) > 0


def test_threads_do_not_change_a_bit(native):
    x = np.random.default_rng(0).standard_normal((300, 256)).astype(np.float32)
    order = sequency_order(sylvester(256))
    for isa in range(min(native.isa_supported(), 2) + 1):
        one = run(native, x, "float32", 256, isa, permutation=order)
        np.testing.assert_array_equal(run(native, x, "float32", 256, isa, permutation=order, threads=4), one)
