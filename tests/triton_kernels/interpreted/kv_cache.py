"""The Triton kernels of the key-value cache against the reference. test_triton_kv_cache.py runs this."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rcp_kernels.ops import KVStorage, empty_kv_cache, fake_quantize_kv, reference
from rcp_kernels.triton import kv_cache as kernels

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning")


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def filled(batch: int, kv_heads: int, capacity: int, length: int, head_dim: int, seed: int) -> list[torch.Tensor]:
    """Keys and values of `length` positions; what is beyond them would read as NaN."""
    storage = []
    for i in range(2):
        codes, scales = empty_kv_cache(batch, kv_heads, capacity, head_dim, DEVICE)
        codes.fill_(0xFF)
        scales.fill_(float("nan"))
        x = random(batch, kv_heads, length, head_dim, seed=seed + i)
        reference.kv_cache_append(x, codes, scales, 0)
        storage += [codes, scales]
    return storage


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [1, 7, 32, 33, 64, 80, 128, 256])
def test_append_and_dequantize_are_the_reference_bit_for_bit(head_dim, dtype):
    x = (random(2, 5, 3, head_dim, seed=head_dim) * 3 + 0.5).to(dtype).transpose(1, 2)
    codes, scales = empty_kv_cache(2, 3, 9, head_dim, DEVICE)
    codes.fill_(0xFF)
    scales.fill_(7.0)
    expected = [codes.clone(), scales.clone()]
    reference.kv_cache_append(x, *expected, 2, 0.95)
    kernels.kv_cache_append(x, codes, scales, 2, 0.95)
    assert torch.equal(codes, expected[0])
    assert torch.equal(scales, expected[1])
    out = torch.full((2, 3, 7, head_dim), float("nan"), device=DEVICE)
    kernels.kv_cache_dequantize(codes, scales, out)
    assert torch.equal(out, reference.kv_cache_dequantize(codes, scales, 7, head_dim))


@pytest.mark.parametrize("value", [0.0, 1e-40, 1e-7, 65504.0])
def test_append_of_vanishing_and_large_vectors(value):
    x = torch.tensor([0.0, value, -value / 3, value], device=DEVICE).expand(1, 1, 2, 4)
    found, expected = empty_kv_cache(1, 1, 2, 4, DEVICE), empty_kv_cache(1, 1, 2, 4, DEVICE)
    kernels.kv_cache_append(x, *found, 0)
    reference.kv_cache_append(x, *expected, 0)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e6, -1e6])
def test_what_cannot_be_stored_reads_as_nan(bad):
    x = random(1, 1, 3, 8)
    x[0, 0, 1, 3] = bad
    codes, scales = empty_kv_cache(1, 1, 3, 8, DEVICE)
    kernels.kv_cache_append(x, codes, scales, 0)
    read = reference.kv_cache_dequantize(codes, scales, 3, 8)
    assert read[0, 0, 1].isnan().all()
    assert torch.equal(read[0, 0, ::2], fake_quantize_kv(x[0, 0, ::2]))


# Of float16 and bfloat16, what rounding the weights and the result to them costs, in units of the largest value.
BOUND = {torch.float32: 3e-6, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}


@settings(max_examples=12 if DEVICE == "cpu" else 200)
@given(data=st.data())
def test_attention_is_the_reference(data):
    batch, kv_heads, groups, queries = (data.draw(st.integers(1, n)) for n in (2, 2, 7, 4))
    head_dim = data.draw(st.sampled_from([1, 7, 32, 33, 64, 80, 128]))
    length = queries + data.draw(st.integers(0, 200))
    dtype, causal = data.draw(st.sampled_from(DTYPES)), data.draw(st.booleans())
    window, seed = data.draw(st.sampled_from([0, 0, 1, 70])), data.draw(st.integers(0, 2**31))
    storage = filled(batch, kv_heads, length + 3, length, head_dim, seed)
    query = random(batch, kv_heads * groups, queries, head_dim, dtype=dtype, seed=seed + 5)
    mask = None
    if data.draw(st.booleans()):
        mask = random(batch, data.draw(st.sampled_from([1, kv_heads * groups])), queries, length, seed=seed + 6) < 0.5
        mask[0, 0, 0] = False
    arguments = (length, head_dim**-0.5, causal, window, mask)
    out = kernels.kv_cache_attention(query, *storage, *arguments)
    assert out.dtype == dtype
    expected = reference.kv_cache_attention(query, KVStorage(*storage), *arguments)
    assert (out.double() - expected).abs().max() <= BOUND[dtype] * max(4.0, expected.abs().max())
    assert torch.equal(out, kernels.kv_cache_attention(query, *storage, *arguments))


def test_splits():
    """Long enough for several splits and several tiles of rows, and nothing left for the last query to see."""
    storage = filled(1, 1, 400, 399, 64, 3)
    assert kernels.splits_of(2, 399)[0] > 4
    query = random(1, 9, 2, 64)
    mask = torch.ones(1, 1, 2, 399, dtype=torch.bool, device=DEVICE)
    mask[..., 1, :] = False
    out = kernels.kv_cache_attention(query, *storage, 399, 0.125, True, 0, mask)
    expected = reference.kv_cache_attention(query, KVStorage(*storage), 399, 0.125, True, 0, mask)
    assert (out - expected).abs().max() < 3e-6
    assert (out[:, :, 1] == 0).all()


def test_empty():
    storage = filled(1, 2, 4, 2, 8, 0)
    assert kernels.kv_cache_attention(random(1, 2, 0, 8), *storage, 2, 1.0).shape == (1, 2, 0, 8)
    assert (kernels.kv_cache_attention(random(1, 2, 1, 8), *storage, 0, 1.0, False) == 0).all()
    kernels.kv_cache_append(random(1, 2, 0, 8), *storage[:2], 1)


def held(number: int) -> torch.Tensor:
    return torch.tensor(number, device=DEVICE)


@pytest.mark.parametrize("place", [0, 1, 5])
def test_append_from_held_is_append_at_that_position(place):
    x = random(2, 3, 2, 33)
    found, expected = empty_kv_cache(2, 3, 8, 33, DEVICE), empty_kv_cache(2, 3, 8, 33, DEVICE)
    reference.kv_cache_append(x, *expected, place + 1)
    kernels.kv_cache_append(x, *found, 1, 1.0, held(place))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("place", [-3, 7, 100])
def test_append_without_room_writes_nothing(place):
    """Three of four heads are followed by another head's positions, which stay as they are."""
    codes, scales = empty_kv_cache(2, 2, 8, 33, DEVICE)
    kernels.kv_cache_append(random(2, 2, 2, 33), codes, scales, 1, 1.0, held(place))
    room = 0 <= place + 1 < 8 or 0 <= place + 2 < 8
    assert room == bool((scales != 0).any())
    assert not room or (scales != 0).any(-1).sum() == 4


@pytest.mark.parametrize("length", [2, 63, 64, 65, 300])
@pytest.mark.parametrize("window", [0, 70])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_to_held_positions_is_the_reference(length, window, masked):
    storage = filled(2, 2, 300, length, 32, length)
    query = random(2, 6, 2, 32)
    mask = None
    if masked:
        mask = random(2, 1, 2, 300, seed=3) < 0.5
        mask[..., 0] = True
    arguments = (2, 0.2, True, window, mask)
    out = kernels.kv_cache_attention(query, *storage, *arguments, held(length - 2))
    expected = reference.kv_cache_attention(query, KVStorage(*storage), *arguments, held(length - 2))
    assert (out - expected).abs().max() < 1e-5


def test_attention_beyond_the_capacity_is_nan():
    storage = filled(1, 1, 70, 70, 32, 0)
    assert kernels.kv_cache_attention(random(1, 3, 1, 32), *storage, 1, 0.2, held=held(69)).isfinite().all()
    assert kernels.kv_cache_attention(random(1, 3, 1, 32), *storage, 1, 0.2, held=held(70)).isnan().all()


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA tensors need a GPU")
def test_dispatch():
    storage = filled(1, 2, 70, 64, 64, 0)
    x, query = random(1, 2, 1, 64), random(1, 4, 1, 64)
    torch.ops.rcp_kernels.kv_cache_append(x, *storage[:2], 64)
    torch.ops.rcp_kernels.kv_cache_append(x, *storage[2:], 64)
    out = torch.ops.rcp_kernels.kv_cache_attention(query, *storage, 65, 0.125)
    assert torch.equal(out, kernels.kv_cache_attention(query, *storage, 65, 0.125))
