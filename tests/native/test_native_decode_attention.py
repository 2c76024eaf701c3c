"""decode_attention of every ISA against float64, with the storage around the token watched."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import FLOAT_TYPES, from_bytes, representable, to_bytes
from test_native_token_prologue import rounded

F = np.float32


def run(native, qkv, cos, sin, keys, values, name, length, scale, isa, threads=1):
    batch, kv_heads, capacity, dim = keys.shape
    heads = qkv.shape[1] - 2 * kv_heads
    raw = native.decode_attention(
        *(to_bytes(x, name) for x in (qkv, cos, sin, keys, values)), name, batch, heads, kv_heads, dim, capacity,
        length, scale, isa, threads,
    )  # fmt: skip
    out, *caches = (from_bytes(x, name) for x in raw)
    return out.reshape(batch, heads, dim), *(x.reshape(keys.shape) for x in caches)


def expected(native, qkv, cos, sin, keys, values, name, length, scale):
    """The embedding rounded after each step, the rest in float64."""
    batch, kv_heads, _, dim = keys.shape
    heads = qkv.shape[1] - 2 * kv_heads
    turning = qkv[:, : heads + kv_heads]
    swapped = np.concatenate([-turning[..., dim // 2 :], turning[..., : dim // 2]], -1)
    turned = rounded(native, turning * cos[:, None], name) + rounded(native, swapped * sin[:, None], name)
    turned = rounded(native, turned, name)
    keys, values = keys.copy(), values.copy()
    keys[:, :, length], values[:, :, length] = turned[:, heads:], qkv[:, heads + kv_heads :]
    out = np.empty((batch, heads, dim))
    for b in range(batch):
        for h in range(heads):
            kv = h // (heads // kv_heads)
            scores = keys[b, kv, : length + 1].astype(np.float64) @ turned[b, h].astype(np.float64) * scale
            weights = np.exp(scores - scores.max())
            out[b, h] = weights / weights.sum() @ values[b, kv, : length + 1].astype(np.float64)
    return out, keys, values


@given(
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    half=st.integers(1, 40),
    length=st.integers(0, 50),
    room=st.integers(1, 3),
    shared=st.booleans(),
    name=st.sampled_from(FLOAT_TYPES),
    seed=st.integers(0, 2**31),
)
def test_agrees_with_float64(native, batch, kv_heads, groups, half, length, room, shared, name, seed):
    rng = np.random.default_rng(seed)

    def noise(*shape):
        return representable(rng.standard_normal(shape).astype(F), name)

    dim = 2 * half
    qkv = noise(batch, (groups + 2) * kv_heads, dim)
    cos, sin = noise(1 if shared else batch, dim), noise(1 if shared else batch, dim)
    keys, values = (noise(batch, kv_heads, length + room, dim) for _ in range(2))
    scale = dim**-0.5
    y, *caches = expected(native, qkv, cos, sin, keys, values, name, length, scale)
    bound = 1e-5 * np.abs(caches[1]).max() + {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}[name] * np.abs(
        y
    )
    first = None
    for isa in range(min(native.isa_supported(), 2) + 1):
        for threads in (1, 3):
            out, *after = run(native, qkv, cos, sin, keys, values, name, length, scale, isa, threads)
            assert (np.abs(out - y) <= bound).all(), isa
            for mine, theirs in zip(after, caches, strict=True):
                np.testing.assert_array_equal(mine, theirs)
            first = out if first is None else first
            np.testing.assert_array_equal(out, first, err_msg=f"isa {isa}, {threads} threads")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_not_finite_inputs_reach_the_output(native, bad):
    """As in torch's attention: nothing is checked, and no path crashes."""
    for isa in range(min(native.isa_supported(), 2) + 1):
        qkv = np.full((1, 3, 8), bad, F)
        ones = np.ones((1, 8), F)
        storage = np.ones((1, 1, 4, 8), F)
        out, *_ = run(native, qkv, ones, ones, storage, storage, "float32", 3, 1.0, isa)
        assert not np.isfinite(out).any()
