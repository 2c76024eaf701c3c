"""gptq_round of every ISA against numpy's float32, which rounds every product and every sum: bit for bit."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st


def gptq_round(block, upper, table, first, last):
    block = block.copy()
    codes = np.empty((len(block), last - first), np.uint8)
    errors = np.empty(codes.shape, np.float32)
    bounds = table[:, 1:] * np.float32(0.5) + table[:, :-1] * np.float32(0.5)
    for j in range(first, last):
        code = (block[:, j, None] > bounds).sum(1)
        nearest = np.take_along_axis(table, code[:, None], 1)[:, 0]
        error = (block[:, j] - nearest) * (np.float32(1) / upper[j, j])
        codes[:, j - first], errors[:, j - first] = code, error
        block[:, j + 1 :] -= error[:, None] * upper[j, j + 1 :]
    return block, codes, errors


@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 40),
    columns=st.integers(1, 60),
    cut=st.tuples(st.integers(0, 60), st.integers(0, 60)),
    levels=st.sampled_from([2, 4, 8, 16]),
    threads=st.integers(1, 3),
)
def test_equals_numpy_on_every_isa(native, seed, rows, columns, cut, levels, threads):
    first, last = sorted(min(each, columns) for each in cut)
    rng = np.random.default_rng(seed)
    block = rng.standard_normal((rows, columns)).astype(np.float32)
    upper = np.triu(rng.standard_normal((columns, columns)).astype(np.float32) * np.float32(0.1))
    np.fill_diagonal(upper, rng.random(columns).astype(np.float32) + 0.5)
    upper += np.tril(np.full_like(upper, np.nan), -1)  # is not read
    table = np.sort(rng.standard_normal((rows, levels)).astype(np.float32))
    expected = gptq_round(block, upper, table, first, last)
    for isa in range(min(native.isa_supported(), 2) + 1):
        found = native.gptq_round(block, upper, table, first, last, isa, threads)
        for each, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(each, other)
