"""The key-value cache of every ISA against numpy: stored bits exactly, attention within float32 rounding of float64."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import FLOAT_TYPES, from_bytes, representable, to_bytes


def isas(native):
    return range(min(native.isa_supported(), 2) + 1)


def quantize(x: np.ndarray, clip: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes int64, scale and zero-point float16 [..., 1]: docs/kv_cache.md, step by step in float32."""
    low = np.minimum(x.min(axis=-1, keepdims=True), np.float32(0)) * np.float32(clip)
    high = np.maximum(x.max(axis=-1, keepdims=True), np.float32(0)) * np.float32(clip)
    zero = low.astype(np.float16)
    scale = ((high - zero.astype(np.float32)) / np.float32(15)).astype(np.float16)
    wide = scale.astype(np.float32)
    inverse = np.divide(np.float32(1), wide, out=np.zeros_like(wide), where=wide > 0)
    q = np.clip(np.rint((x - zero.astype(np.float32)) * inverse), 0, 15).astype(np.int64)
    return q, scale, zero


def pack(q: np.ndarray) -> np.ndarray:
    padded = np.concatenate([q, np.zeros((*q.shape[:-1], q.shape[-1] % 2), np.int64)], axis=-1)
    return (padded[..., ::2] | padded[..., 1::2] << 4).astype(np.uint8)


def attention(query, keys, values, scale, causal, window, mask):
    """float64 [heads, queries, head_dim] of float64 keys and values [heads, length, head_dim]."""
    queries, length = query.shape[1], keys.shape[1]
    own = np.arange(length - queries, length)[:, None]
    at = np.arange(length)[None]
    allowed = np.ones((queries, length), bool)
    if causal:
        allowed &= at <= own
    if window:
        allowed &= at > own - window
    if mask is not None:
        allowed &= mask.astype(bool)
    scores = np.where(allowed, query @ keys.swapaxes(1, 2) * scale, -np.inf)
    top = scores.max(axis=-1, keepdims=True, initial=-1e300)
    weights = np.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    return np.divide(weights, total, out=np.zeros_like(weights), where=total > 0) @ values


@given(data=st.data())
def test_append_and_dequantize_are_numpy_bit_for_bit(native, data):
    name = data.draw(st.sampled_from(FLOAT_TYPES))
    vectors, tokens, head_dim = (data.draw(st.integers(1, n)) for n in (2, 3, 130))
    position, clip = data.draw(st.integers(0, 2)), data.draw(st.sampled_from([1.0, 0.95, 0.25]))
    seed, exponent = data.draw(st.integers(0, 2**31)), data.draw(st.integers(-9, 4))
    x = np.random.default_rng(seed).standard_normal((vectors, tokens, head_dim)) * 10.0**exponent
    x = representable(x.astype(np.float32) + data.draw(st.sampled_from([0, 1, -3])), name)
    with np.errstate(over="ignore"):
        q, scale, zero = quantize(x, clip)
    fits = bool(np.isfinite(scale).all() and np.isfinite(zero).all() and (np.abs(x) * np.float32(clip) < 65520).all())
    capacity = position + tokens + 1
    for isa in isas(native):
        codes, scales, bad = native.kv_cache_append(
            to_bytes(x, name), name, vectors, tokens, head_dim, capacity, position, clip, isa, 2
        )
        assert (bad == -1) == fits
        if not fits:
            continue
        stored = slice(position, position + tokens)
        np.testing.assert_array_equal(codes[:, stored], pack(q))
        np.testing.assert_array_equal(
            scales[:, stored], np.concatenate([scale, zero], axis=-1).astype(np.float16).view(np.uint16)
        )
        for outside in (slice(0, position), slice(position + tokens, None)):
            assert (codes[:, outside] == 0xFF).all()
            assert (scales[:, outside] == 0xFFFF).all()
        read = native.kv_cache_dequantize(codes[:, stored], scales[:, stored], head_dim, tokens, "float32", isa, 2)
        expected = q.astype(np.float32) * scale.astype(np.float32) + zero.astype(np.float32)
        np.testing.assert_array_equal(read.view(np.float32).reshape(x.shape), expected)
        # Half a step, a saturated end of float16's rounding, and float16's own smallest steps.
        if clip == 1.0:
            assert (np.abs(expected - x) <= 0.51 * scale.astype(np.float32) + 2.0**-20).all()


@pytest.mark.parametrize("name", FLOAT_TYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_append_flags_what_is_not_finite(native, name, bad):
    for head_dim in (1, 15, 16, 17, 33):
        for at in {0, head_dim - 1}:
            x = np.ones((1, 3, head_dim), np.float32)
            x[0, 1, at] = bad
            for isa in isas(native):
                args = (to_bytes(x, name), name, 1, 3, head_dim, 3, 0, 1.0, isa, 1)
                assert native.kv_cache_append(*args)[2] == 1


def test_append_at_the_edge_of_float16(native):
    for value, stored in ((65504.0, True), (65519.0, True), (65520.0, False), (1e30, False)):
        for sign in (1, -1):
            x = np.float32([[[sign * value, 0]]])
            for isa in isas(native):
                bad = native.kv_cache_append(to_bytes(x, "float32"), "float32", 1, 1, 2, 1, 0, 1.0, isa, 1)[2]
                assert (bad == -1) == stored


@settings(max_examples=60)
@given(data=st.data())
def test_attention_is_numpy_and_equal_on_every_isa(native, data):
    name = data.draw(st.sampled_from(FLOAT_TYPES))
    heads, groups, queries = (data.draw(st.integers(1, n)) for n in (2, 6, 3))
    head_dim = data.draw(st.one_of(st.integers(1, 70), st.sampled_from([64, 80, 96, 128, 256])))
    length = data.draw(st.one_of(st.integers(queries, 40), st.integers(queries, 700)))
    capacity = length + data.draw(st.integers(0, 3))
    causal, window = data.draw(st.booleans()), data.draw(st.sampled_from([0, 0, 1, 7, 300]))
    random = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    spread = data.draw(st.sampled_from([0.1, 1.0, 10.0]))
    stored = [random.standard_normal((heads, length, head_dim)).astype(np.float32) for _ in range(2)]
    query = random.standard_normal((heads * groups, queries, head_dim)) * spread
    query = representable(query.astype(np.float32), name)
    mask = (random.random((queries, length)) < 0.3).astype(np.uint8) if data.draw(st.booleans()) else None
    caches, floats = [], []
    for x in stored:
        q, scale, zero = quantize(x, 1.0)
        codes, scales = (np.full((heads, capacity, n), 0xFF, t) for n, t in (((head_dim + 1) // 2, "u1"), (2, "u2")))
        codes[:, :length] = pack(q)
        scales[:, :length] = np.concatenate([scale, zero], axis=-1).view(np.uint16)
        caches += [codes, scales]
        floats.append((q * scale.astype(np.float64) + zero).repeat(groups, axis=0))
    factor = head_dim**-0.5
    expected = attention(query.astype(np.float64), *floats, factor, causal, window, mask)
    # Scores are off by some float32 roundings of what they sum up, and so are the weights, relatively.
    size = np.abs(query).sum(axis=-1).max() * factor * np.abs(floats[0]).max()
    bound = (40 + 4 * size * (head_dim / 16 + 8)) * 2.0**-24 * max(np.abs(floats[1]).max(), 1e-3)
    bound += {"float32": 0, "float16": 2.0**-11, "bfloat16": 2.0**-8}[name] * np.abs(expected) + 1e-7
    results = []
    for isa in isas(native):
        for threads in (1, 3):
            out = native.kv_cache_attention(
                to_bytes(query, name), name, groups, queries, head_dim, *caches, length, factor, causal, window, mask,
                isa, threads,
            )  # fmt: skip
            assert (np.abs(from_bytes(out, name).reshape(expected.shape) - expected) <= bound).all()
            results.append(out)
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


def test_attention_flags_a_query_that_is_not_finite(native):
    codes, scales = np.zeros((1, 4, 17), np.uint8), np.zeros((1, 4, 2), np.uint16)
    for bad in (np.nan, np.inf):
        for at in (0, 15, 31, 32):
            query = np.zeros((1, 1, 33), np.float32)
            query[0, 0, at] = bad
            for isa in isas(native):
                arguments = (to_bytes(query, "float32"), "float32", 1, 1, 33, codes, scales, codes, scales)
                assert native.kv_cache_attention(*arguments, 4, 1.0, True, 0, None, isa, 1) is None


def test_scores_far_apart(native):
    """One key wins by more than float32 can tell, one is masked, and none is left: 1, the other, and 0."""
    length, head_dim = 300, 32
    keys = np.zeros((1, length, head_dim), np.float32)
    keys[0, 280] = 100.0
    values = np.repeat(np.arange(length, dtype=np.float32)[None, :, None], head_dim, axis=2)
    caches = []
    for x in (keys, values):
        q, scale, zero = quantize(x, 1.0)
        caches += [pack(q), np.concatenate([scale, zero], axis=-1).view(np.uint16)]
    query = np.full((1, 1, head_dim), 100.0, np.float32)
    only = np.zeros((1, length), np.uint8)
    only[0, 3] = 1
    for mask, expected in ((None, 280.0), (only, 3.0), (np.zeros((1, length), np.uint8), 0.0)):
        for isa in isas(native):
            arguments = (to_bytes(query, "float32"), "float32", 1, 1, head_dim, *caches, length, 1.0, True, 0, mask)
            out = native.kv_cache_attention(*arguments, isa, 2).view(np.float32)
            np.testing.assert_allclose(out, expected, rtol=2.0**-11)
