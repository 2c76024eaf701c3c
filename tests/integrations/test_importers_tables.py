"""What can be held exactly is, whatever it is made of: rcp_kernels.integrations.importers.tables."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rcp_kernels.integrations.importers import import_lut, tables
from rcp_kernels.integrations.importers.inputs import unpack_words
from rcp_kernels.integrations.importers.tables import pack_levels

scales = st.integers(1, 2047).flatmap(lambda m: st.integers(-24, 5).map(lambda e: m * 2.0**e))
integers = st.lists(st.integers(-127, 127), min_size=4, max_size=4)
numbers = st.one_of(st.integers(-5000, 5000).map(float), st.floats(-1e4, 1e4, width=32))


@given(st.lists(st.tuples(scales, integers), min_size=1, max_size=5))
def test_any_integers_times_any_short_scales_are_held(groups):
    # Scales of one tensor reach from 2**-24 to 2**16: as far as float16 does.
    table = torch.tensor([[scale * level for level in levels] for scale, levels in groups], dtype=torch.float64)
    codes = torch.arange(4, dtype=torch.uint8).repeat(len(groups), 8)
    imported = import_lut(codes, table, bits=2)
    assert imported.error == 0.0
    assert torch.equal(imported.dequantize().double(), table.gather(1, codes.long()))


def short(number):
    """Whether a positive fraction is at most 11 bits times a power of two."""
    top = number.numerator
    while top % 2 == 0:
        top //= 2
    return top < 2048 and number.denominator & (number.denominator - 1) == 0


@given(st.lists(numbers, min_size=4, max_size=4))
def test_what_is_refused_cannot_be_held(levels):
    codes = torch.arange(4, dtype=torch.uint8).repeat(1, 8)
    table = torch.tensor([levels], dtype=torch.float64)
    exact = [Fraction(level) for level in levels if level]
    # Every scale that could do: the largest level divided by the integer that stands for it.
    candidates = [abs(max(exact, key=abs)) / n for n in range(1, 128)] if exact else []
    possible = not exact or any(short(s) and all((level / s).denominator == 1 for level in exact) for s in candidates)
    if not possible:
        with pytest.raises(ValueError, match=r"row, group \(0, 0\)"):
            import_lut(codes, table, bits=2)
        imported = import_lut(codes, table, bits=2, exact=False)
        assert 0 < imported.error <= 1 / 254 + 2**-11
    else:
        imported = import_lut(codes, table, bits=2)
        assert imported.error == 0.0
    bound = imported.error * max(map(abs, levels)) * (1 + 1e-12)
    assert float((imported.dequantize() - table.gather(1, codes.long())).abs().max()) <= bound


@pytest.mark.parametrize("exact", [True, False])
def test_rows_in_chunks_and_any_sign_of_a_scale(monkeypatch, exact):
    torch.manual_seed(0)
    codes = torch.randint(0, 8, (11, 200), dtype=torch.uint8)
    levels = torch.randint(-127, 128, (11, 4, 8), dtype=torch.int16)
    factors = torch.randn(11, 4).half() if exact else torch.randn(11, 4)
    factors[3] = 0
    group = torch.arange(200) // 64
    values = (levels * factors[..., None].double())[torch.arange(11)[:, None], group, codes.long()]
    for entries in (1, 100, 1 << 18):
        monkeypatch.setattr(tables, "_CHUNK_ENTRIES", entries)
        imported = pack_levels("test", codes, levels, factors, bits=3, group_size=64, exact=exact)
        difference = (imported.dequantize() - values).abs().max()
        assert (float(difference) == 0) == exact == (imported.error == 0)
        assert float(difference) <= imported.error * float(values.abs().max())
        if entries == 1:
            first = imported.weight
        for name in first.TENSORS:
            assert torch.equal(getattr(imported.weight, name), getattr(first, name))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("count", [1, 31, 32, 33, 100])
def test_unpack_words_reads_a_bit_stream(bits, count):
    rng = np.random.default_rng(count)
    codes = rng.integers(0, 2**bits, (3, count))
    words = np.zeros((3, -(-count * bits // 32)), np.int64)
    for row in range(3):
        whole = sum(int(code) << (bits * k) for k, code in enumerate(codes[row]))
        for word in range(words.shape[1]):
            words[row, word] = whole >> (32 * word) & 0xFFFFFFFF
    stored = torch.from_numpy(words.astype(np.uint32).view(np.int32))
    assert torch.equal(unpack_words(stored, bits, count), torch.from_numpy(codes.astype(np.uint8)))
    assert torch.equal(unpack_words(stored.t().contiguous().t(), bits, count), torch.from_numpy(codes.astype(np.uint8)))
