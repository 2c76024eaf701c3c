"""lut_linear of every ISA, and of AMX with its instructions computed in software, against numpy.

Integers exactly: with unit scales and an x whose quantization scale is 1, y is the group sum itself. Floats within 1e-5
of the sum of magnitudes, the contract's bound. All paths agree bit for bit, because their float steps are the same.
"""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from reference import FLOAT_TYPES, Weight, from_bytes, representable, to_bytes

SOFT_AMX = "soft amx"
FOUR_STREAMS = "four streams"
WIDENED = "widened"


def random_weight(rng, rows, columns, bits, group_size, unit_scales=False) -> Weight:
    groups = -(-columns // group_size)
    levels = np.sort(rng.integers(-128, 128, (rows, groups, 2**bits)), axis=-1).astype(np.int8)
    scales = np.ones((rows, groups)) if unit_scales else rng.uniform(1e-3, 1e-2, (rows, groups))
    codes = rng.integers(0, 2**bits, (rows, columns)).astype(np.uint8)
    return Weight(codes, levels, scales.astype(np.float16), 1.0 if unit_scales else 0.25, bits, group_size)


def pack(native, w: Weight, threads=1):
    columns = w.codes.shape[1]
    scales = w.scales.view(np.uint16)
    return native.pack_weight(
        w.canonical_codes(), w.levels, scales, w.tensor_scale, columns, w.bits, w.group_size, threads
    )


def paths(native) -> list[int | str]:
    """The ISAs of this machine; AMX proper runs from 16 tokens, its software double and the other variants always."""
    supported = native.isa_supported()
    return [*range(supported + 1), *([SOFT_AMX, FOUR_STREAMS, WIDENED] if supported >= 2 else [])]


def run(native, x, name, w, packed, bias, act_bits, path, threads=1, clip=1.0, input_order=None):
    rows, columns = w.codes.shape
    isa, variant = (2, path) if isinstance(path, str) else (path, "")
    raw = native.lut_linear(
        to_bytes(x, name),
        name,
        packed,
        bias,
        len(x),
        rows,
        columns,
        w.bits,
        w.group_size,
        act_bits,
        clip,
        isa,
        threads,
        variant,
        input_order=input_order,
    )
    return from_bytes(raw, name).reshape(len(x), rows)


cases = {
    "bits": st.sampled_from([2, 3, 4]),
    "group": st.sampled_from([32, 64, 128, None]),
    "rows": st.integers(1, 70),
    "columns": st.integers(1, 400),
    "tokens": st.sampled_from([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 16, 17, 24, 25, 31, 33, 47, 129]),
    "seed": st.integers(0, 2**31),
}


@given(**cases, act_bits=st.sampled_from([4, 8]))
@example(bits=2, group=None, rows=17, columns=700, tokens=33, seed=1, act_bits=8)
@example(bits=3, group=None, rows=33, columns=513, tokens=14, seed=2, act_bits=4)
@example(bits=4, group=None, rows=16, columns=1025, tokens=1, seed=3, act_bits=8)
def test_group_sums_are_exact(native, bits, group, rows, columns, tokens, seed, act_bits):
    rng = np.random.default_rng(seed)
    w = random_weight(rng, rows, columns, bits, group or columns, unit_scales=True)
    qmax = 7 if act_bits == 4 else 127
    x = rng.integers(-qmax, qmax + 1, (tokens, columns)).astype(np.float32)
    x[:, rng.integers(columns)] = qmax  # the scale is then exactly 1
    expected = w.group_sums(x.astype(np.int64)).sum(axis=2)
    if np.abs(w.group_sums(x.astype(np.int64))).sum(axis=2).max(initial=0) >= 2**24:
        return  # a float32 accumulator no longer holds every integer: the bound of the float test applies
    for path in paths(native):
        packed = pack(native, w)
        np.testing.assert_array_equal(
            run(native, x, "float32", w, packed, None, act_bits, path), expected, err_msg=str(path)
        )


@given(
    **cases,
    act_bits=st.sampled_from([4, 8, 16]),
    name=st.sampled_from(FLOAT_TYPES),
    with_bias=st.booleans(),
    clip=st.sampled_from([1.0, 0.9]),
)
def test_agrees_with_float64(native, bits, group, rows, columns, tokens, seed, act_bits, name, with_bias, clip):
    rng = np.random.default_rng(seed)
    w = random_weight(rng, rows, columns, bits, group or columns)
    x = representable(rng.standard_normal((tokens, columns)).astype(np.float32), name)
    bias = rng.standard_normal(rows).astype(np.float32) if with_bias else None
    expected, magnitude = w.linear(x, bias, act_bits, np.float32(clip))
    # Half a unit in the last place of the output type comes on top.
    rounding = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}[name]
    bound = 1e-5 * magnitude + rounding * np.abs(expected) + 1e-7
    results = {}
    for path in paths(native):
        y = run(native, x, name, w, pack(native, w), bias, act_bits, path, clip=clip)
        assert (np.abs(y - expected) <= bound).all(), (path, np.abs(y - expected).max())
        results[path] = y
    for path, y in results.items():
        np.testing.assert_array_equal(y, results[0], err_msg=f"{path} differs from the plain C++ path")


@given(**cases, act_bits=st.sampled_from([4, 8, 16]), name=st.sampled_from(FLOAT_TYPES))
def test_an_input_order_is_bit_equal_to_reordered_inputs(
    native, bits, group, rows, columns, tokens, seed, act_bits, name
):
    rng = np.random.default_rng(seed)
    w = random_weight(rng, rows, columns, bits, group or columns)
    packed = pack(native, w)
    x = representable(rng.standard_normal((tokens, columns)).astype(np.float32), name)
    order = rng.permutation(columns)
    for path in paths(native):
        expected = run(native, x[:, order], name, w, packed, None, act_bits, path)
        for threads in (1, 3):
            y = run(native, x, name, w, packed, None, act_bits, path, threads, input_order=order)
            np.testing.assert_array_equal(y, expected, err_msg=str(path))


@given(**cases, act_bits=st.sampled_from([4, 8, 16]), name=st.sampled_from(FLOAT_TYPES))
def test_uniform_groups_are_bit_equal_to_tables(native, bits, group, rows, columns, tokens, seed, act_bits, name):
    """Tables made in registers of the first levels, on every path; -128 and the largest first level among them."""
    rng = np.random.default_rng(seed)
    w = random_weight(rng, rows, columns, bits, group or columns)
    step = 2 ** (7 - bits)
    first = rng.integers(-128, step, (rows, w.groups, 1))
    first.flat[: min(2, first.size)] = (-128, step - 1)[: min(2, first.size)]
    w.levels[:] = first + step * np.arange(2**bits)
    uniform = native.pack_weight(
        w.canonical_codes(), first.astype(np.int8), w.scales.view(np.uint16), w.tensor_scale, columns, bits,
        w.group_size, 1,
    )  # fmt: skip
    table = pack(native, w)
    assert len(table) - len(uniform) == -(-rows // 16) * w.groups * 16 * (2**bits - 1)
    x = representable(rng.standard_normal((tokens, columns)).astype(np.float32), name)
    for path in paths(native):
        y = run(native, x, name, w, uniform, None, act_bits, path)
        np.testing.assert_array_equal(y, run(native, x, name, w, table, None, act_bits, path), err_msg=str(path))
    for back, expected in zip(
        native.unpack_weight(uniform, rows, columns, bits, w.group_size, 2),
        native.unpack_weight(table, rows, columns, bits, w.group_size, 2),
        strict=True,
    ):
        np.testing.assert_array_equal(back, expected)


@given(**cases, act_bits=st.sampled_from([4, 8, 16]))
def test_threads_do_not_change_a_bit(native, bits, group, rows, columns, tokens, seed, act_bits):
    rng = np.random.default_rng(seed)
    w = random_weight(rng, rows * 9, columns, bits, group or columns)
    x = rng.standard_normal((tokens, columns)).astype(np.float32)
    packed = pack(native, w)
    np.testing.assert_array_equal(packed, pack(native, w, threads=3))
    for path in paths(native)[1:]:
        one = run(native, x, "float32", w, packed, None, act_bits, path, threads=1)
        np.testing.assert_array_equal(run(native, x, "float32", w, packed, None, act_bits, path, threads=1), one)
        np.testing.assert_array_equal(run(native, x, "float32", w, packed, None, act_bits, path, threads=3), one)


def test_threads_above_the_serial_threshold(native):
    """Large enough that the pool is really used, by many callers at once."""
    rng = np.random.default_rng(5)
    w = random_weight(rng, 1000, 640, 2, 128)
    packed = pack(native, w)
    x = rng.standard_normal((130, 640)).astype(np.float32)
    for path in paths(native)[1:]:
        one = run(native, x, "float32", w, packed, None, 4, path, threads=1)
        for _ in range(5):
            np.testing.assert_array_equal(run(native, x, "float32", w, packed, None, 4, path, threads=4), one)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_extreme_values_do_not_saturate(native, bits):
    """All levels -128 and all activations -8 (or -128): the largest sums, where 16-bit lanes would overflow first."""
    for act_bits, q, clip in ((4, -8, 0.5), (8, -128, 0.5)):
        for level in (-128, 127):
            w = Weight(
                np.zeros((20, 256), np.uint8),
                np.full((20, 2, 2**bits), level, np.int8),
                np.ones((20, 2), np.float16),
                1.0,
                bits,
                128,
            )
            x = np.full((17, 256), -1.0, np.float32)
            scale = np.float32(np.float32(1.0) * np.float32(clip) / np.float32(7 if act_bits == 4 else 127))
            expected = np.float32(q * level * 256) * scale
            for path in paths(native):
                y = run(native, x, "float32", w, pack(native, w), None, act_bits, path, clip=clip)
                np.testing.assert_array_equal(y, np.full_like(y, expected), err_msg=str(path))


@given(**cases)
def test_pack_and_unpack_are_inverse(native, bits, group, rows, columns, tokens, seed):
    w = random_weight(np.random.default_rng(seed), rows, columns, bits, group or columns)
    codes, levels, scales, tensor_scale = native.unpack_weight(pack(native, w), rows, columns, bits, w.group_size, 2)
    np.testing.assert_array_equal(codes, w.canonical_codes())
    np.testing.assert_array_equal(levels, w.levels)
    np.testing.assert_array_equal(scales.view(np.float16), w.scales)
    assert tensor_scale == w.tensor_scale


@pytest.mark.parametrize("act_bits", [4, 8])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_not_finite_names_the_first_token(native, act_bits, bad):
    w = random_weight(np.random.default_rng(0), 40, 64, 2, 64)
    x = np.ones((50, 64), np.float32)
    x[31, 5] = x[44, 0] = bad
    for path in paths(native):
        with pytest.raises(ValueError, match="token 31 holds NaN or Inf"):
            run(native, x, "float32", w, pack(native, w), None, act_bits, path, threads=2)


def test_a_tampered_blob_is_refused(native):
    w = random_weight(np.random.default_rng(0), 20, 64, 2, 64)
    good = pack(native, w)
    x = np.ones((1, 64), np.float32)
    for change, message in (
        (lambda b: b[:40], "64-byte header"),
        (lambda b: b[:-1], "truncated or padded"),
        (lambda b: np.concatenate([b, b[:1]]), "truncated or padded"),
        (lambda b: np.concatenate([b[:1] ^ 1, b[1:]]), "wrong magic"),
        (lambda b: np.concatenate([b[:8], b[8:9] + 1, b[9:]]), "layout version 1, got 2"),
        (lambda b: np.concatenate([b[:12], b[12:13] + 1, b[13:]]), "was packed with"),
        (lambda b: np.concatenate([b[:16], b[16:17] + 1, b[17:]]), "was packed with out_features 21"),
        (lambda b: np.concatenate([b[:44], b[44:45] + 1, b[45:]]), "truncated or padded"),
        (lambda b: np.concatenate([b[:44], b[44:45] + 2, b[45:]]), r"kind 0 \(table\) or 1 \(uniform\), got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            run(native, x, "float32", w, change(good), None, 4, 0)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((0, 8, 2, 8), "at least 1"),
        ((8, 8, 5, 8), "bits must be 2, 3 or 4"),
        ((8, 80, 2, 16), "group_size must be"),
        ((1, 131072, 2, 131072), "at most 131071"),
    ],
)
def test_shapes_outside_the_format(native, shape, message):
    with pytest.raises(ValueError, match=message):
        native.unpack_weight(np.zeros(64, np.uint8), *shape, 1)


def test_isa_is_checked(native):
    supported = native.isa_supported()
    assert native.current_isa() <= supported
    with pytest.raises(ValueError, match=r"isa must be 0 .* got 7"):
        native.set_isa(7)
    if supported < 3:
        with pytest.raises(ValueError, match="this CPU runs at most"):
            native.set_isa(3)


@pytest.mark.parametrize("size", [0, 7, 8, 511, 4096, 100_003])
@pytest.mark.parametrize("streams", [1, 8])
def test_plain_read_sums_the_words(native, size, streams):
    data = np.random.default_rng(size).integers(0, 256, size).astype(np.uint8)
    expected = int(data[: size // 8 * 8].view(np.int64).sum(dtype=np.int64))
    for isa in (0, min(2, native.isa_supported())):
        assert native.plain_read(data, streams, isa, 1) == expected


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_level_and_extreme_bfloat16_activations(native, bits):
    """-128..127 each meet activations from subnormal (counted as zero) to 1e+30, alike on every path."""
    rng = np.random.default_rng(bits)
    w = random_weight(rng, 128, 64, bits, 32, unit_scales=True)
    w.levels[:] = np.sort(np.resize(np.arange(-128, 128), w.levels.shape), axis=-1)
    x = rng.standard_normal((5, 64)) * 10.0 ** np.array([-42, -39, -30, 0, 30])[:, None]
    x = representable(x.astype(np.float32), "bfloat16")
    packed = pack(native, w)
    results = {path: run(native, x, "bfloat16", w, packed, None, 16, path) for path in paths(native)}
    flushed = np.where(np.abs(x) < 2.0**-126, 0, x).astype(np.float32)
    expected, magnitude = w.linear(flushed, None, 16, np.float32(1))
    for path, y in results.items():
        np.testing.assert_array_equal(y, results[0], err_msg=f"{path} differs from the plain C++ path")
        assert (np.abs(y - expected) <= (2.0**-8 + 1e-5) * magnitude + 2.0**-126).all()
