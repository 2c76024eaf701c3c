"""The norm, the gated activation and the residual inside lut_linear, on every path, against numpy's separate steps."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import FLOAT_TYPES, from_bytes, representable, to_bytes
from test_native_lut_linear import pack, paths, random_weight

F = np.float32


def rounded(native, x, name):
    """float32 values rounded to the nearest that the type holds."""
    x = np.ascontiguousarray(x, F)
    if name == "bfloat16":
        return native.bfloat_to_float(native.float_to_bfloat(x)).astype(F).reshape(x.shape)
    with np.errstate(over="ignore"):
        return x.astype(name).astype(F)


def rms_norm(native, x, weight, epsilon, offset, name):
    """docs/numerics.md, step by step in float32."""
    size = x.shape[1]
    half = 16
    while 2 * half < size:
        half *= 2
    total = np.zeros((len(x), 2 * half), F)
    total[:, :size] = x * x
    while half:
        total = total[:, :half] + total[:, half:]
        half //= 2
    inverse = F(1) / np.sqrt(total * (F(1) / F(size)) + F(epsilon))
    values = x * inverse
    if offset == 0:
        values = rounded(native, values, name)
    return rounded(native, values * (weight + F(offset)), name)


def exp(x):
    x = np.clip(x, F(-87), F(89))
    n = np.rint(x * F(1 / math.log(2)))
    r = (x - n * F(0.693359375)) - n * F(-2.12194440e-4)
    p = np.full_like(x, F(1.9875691500e-4))
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = p * r + F(c)
    p = (p * (r * r) + r) + F(1)
    half = np.rint(n * F(0.5))
    with np.errstate(over="ignore"):
        return np.ldexp(np.ldexp(p, half.astype(int)), (n - half).astype(int)).astype(F)


def gated_activation(native, x, activation, name):
    gate, up = np.split(x, 2, axis=1)
    t = gate
    if activation == 2:
        t = gate * ((gate * gate) * F(2 * math.sqrt(2 / math.pi) * 0.044715) + F(2 * math.sqrt(2 / math.pi)))
    value = gate / (F(1) + exp(F(0) - t))
    return rounded(native, rounded(native, value, name) * up, name)


def run(native, x, name, w, packed, path, threads=1, act_bits=4, **fused):
    rows, columns = w.codes.shape
    isa, variant = (2, path) if isinstance(path, str) else (path, "")
    raw = native.lut_linear(
        to_bytes(x, name), name, packed, None, len(x), rows, columns, w.bits, w.group_size, act_bits, 1.0, isa, threads,
        variant, **fused,
    )  # fmt: skip
    return from_bytes(raw, name).reshape(len(x), rows)


cases = {
    "rows": st.integers(1, 70),
    "columns": st.integers(1, 400),
    "tokens": st.sampled_from([0, 1, 2, 5, 17, 129]),
    "name": st.sampled_from(FLOAT_TYPES),
    "act_bits": st.sampled_from([4, 8, 16]),
    "with_order": st.booleans(),
    "with_residual": st.booleans(),
    "seed": st.integers(0, 2**31),
}


def check(native, x, prologue, rng, rows, columns, name, act_bits, with_order, with_residual, **fused):
    w = random_weight(rng, rows, columns, 2, 64)
    packed = pack(native, w)
    order = rng.permutation(columns) if with_order else None
    residual = representable(rng.standard_normal((len(x), rows)).astype(F), name)
    if with_residual:
        fused["residual"] = to_bytes(residual, name)
    for path in paths(native):
        expected = run(native, prologue, name, w, packed, path, act_bits=act_bits, input_order=order)
        if with_residual:
            expected = rounded(native, expected + residual, name)
        for threads in (1, 3):
            y = run(native, x, name, w, packed, path, threads, act_bits, input_order=order, **fused)
            np.testing.assert_array_equal(y, expected, err_msg=str(path))


@given(**cases, offset=st.sampled_from([0.0, 1.0]), epsilon=st.sampled_from([1e-6, 1e-5]), scale=st.integers(-3, 3))
def test_norm_is_bit_equal_to_a_norm_before(
    native, rows, columns, tokens, name, act_bits, with_order, with_residual, seed, offset, epsilon, scale
):
    rng = np.random.default_rng(seed)
    x = representable((rng.standard_normal((tokens, columns)) * 10.0**scale).astype(F), name)
    weight = rng.standard_normal(columns).astype(F)
    prologue = rms_norm(native, x, weight, epsilon, offset, name)
    check(
        native, x, prologue, rng, rows, columns, name, act_bits, with_order, with_residual,
        norm_weight=weight, norm_epsilon=epsilon, norm_offset=offset,
    )  # fmt: skip


@given(**cases, activation=st.sampled_from([1, 2]), scale=st.integers(-3, 2))
def test_gated_activation_is_bit_equal_to_one_before(
    native, rows, columns, tokens, name, act_bits, with_order, with_residual, seed, activation, scale
):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, 2 * columns)) * 10.0**scale
    x = representable(np.clip(x, -200, 200).astype(F), name)  # float16 ends at 65504
    prologue = gated_activation(native, x, activation, name)
    prologue[np.abs(prologue) < 2.0**-126] = 0  # the operator flushes subnormals
    check(native, x, prologue, rng, rows, columns, name, act_bits, with_order, with_residual, activation=activation)


@pytest.mark.parametrize("activation", [1, 2])
def test_activation_is_that_of_float64(native, activation):
    """Over gates of all sizes, read off a layer whose weight is the identity."""
    gate = np.concatenate([np.linspace(-110, 110, 5000), [-3e38, -1e20, 1e20, 3e38, 0.0]]).astype(F)
    y = gated_activation(native, np.stack([gate, np.ones_like(gate)], 1), activation, "float32")[:, 0]
    g = gate.astype(np.float64)
    z = g if activation == 1 else 2 * math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)
    with np.errstate(over="ignore"):
        exact = g / (1 + np.exp(-z))
    # Below e**-87 the exponential stays where it is.
    assert (np.abs(y - exact) <= 1e-6 * np.abs(exact) * np.maximum(1, np.minimum(np.abs(z), 90) / 8) + 1e-30).all()


def test_a_token_that_is_not_finite_is_named(native):
    rng = np.random.default_rng(0)
    w = random_weight(rng, 20, 64, 2, 64)
    packed = pack(native, w)
    norm = {"norm_weight": np.ones(64, F), "norm_epsilon": 1e-6}
    for bad in (np.nan, np.inf, -np.inf):
        for fused, columns in ((norm, 64), ({"activation": 1}, 128), ({"activation": 2}, 128)):
            x = np.ones((7, columns), F)
            x[3, 40] = bad
            for path in paths(native):
                if fused is not norm and bad == np.inf:
                    continue
                with pytest.raises(ValueError, match="token 3 holds NaN or Inf"):
                    run(native, x, "float32", w, packed, path, **fused)
