"""Conversions of the executor against exact fractions, rounded once."""

import math
from fractions import Fraction

import numpy as np
import pytest
from ptx.bench import evaluate
from ptx_floats import DTYPES, operands, rounded, same, value_of

RANDOM = np.random.default_rng(6)
ROUND_WHOLE = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}


@pytest.mark.parametrize("name", ["f16", "bf16", "f32", "f64"])
def test_floats_to_integers(name):
    bits = operands(name, 1, 300)[0]
    values = np.array([*RANDOM.uniform(-300, 300, 60), 0.5, 1.5, 2.5, -0.5, -1.5, 127.5, 2.0**31, -(2.0**31), 2.0**63])
    if name == "bf16":
        extra = (values.astype("f4").view("u4") >> 16).astype("u2")
    else:
        with np.errstate(over="ignore"):
            extra = values.astype({"f16": "f2", "f32": "f4", "f64": "f8"}[name]).view(DTYPES[name])
    bits = np.concatenate((bits, extra))
    for mode, whole in ROUND_WHOLE.items():
        targets = ["int16", "uint16", "int32", "uint32", "int64", "uint64"]
        if name == "bf16":
            targets = ["int32", "uint32"]
        text = "\n".join(f"cvt.{mode}.{t.replace('uint', 'u').replace('int', 's')}.{name} %{t}_, %a;" for t in targets)
        found = evaluate(text, {"a": bits}, {f"{t}_": t for t in targets})
        for target in targets:
            info = np.iinfo(target)
            for raw, value in zip(bits.tolist(), found[f"{target}_"].tolist(), strict=True):
                x = value_of(raw, name)
                if math.isnan(x):
                    wanted = 0 if info.bits < 64 and name != "f64" else 1 << (info.bits - 1)
                elif math.isinf(x):
                    wanted = info.max if x > 0 else info.min
                else:
                    wanted = min(max(whole(x), info.min), info.max)
                assert value & (2**info.bits - 1) == wanted & (2**info.bits - 1), (mode, target, x)


def test_integers_to_floats():
    for dtype in ("int16", "uint16", "int32", "uint32", "int64", "uint64"):
        info = np.iinfo(dtype)
        a = RANDOM.integers(info.min, info.max, 300, dtype=dtype, endpoint=True)
        a[::2] >>= RANDOM.integers(0, info.bits - 8, a[::2].size).astype(dtype)
        a[:3] = info.min, info.max, 0
        kind = dtype.replace("uint", "u").replace("int", "s")
        text = f"cvt.rn.f32.{kind} %d_, %a;\ncvt.rn.f16.{kind} %e_, %a;\ncvt.rn.f64.{kind} %f_, %a;"
        found = evaluate(text, {"a": a}, {"d_": "uint32", "e_": "uint16", "f_": "uint64"})
        for value, d, e, f in zip(a.tolist(), *[found[n].tolist() for n in found], strict=True):
            assert value_of(d, "f32") == rounded(Fraction(value), "f32")
            assert value_of(e, "f16") == rounded(Fraction(value), "f16")
            assert value_of(f, "f64") == rounded(Fraction(value), "f64")
    a = RANDOM.integers(-(2**31), 2**31, 300).astype("i4")
    for mode in ("rz", "rm", "rp"):
        found = evaluate(f"cvt.{mode}.f32.s32 %d_, %a;", {"a": a}, {"d_": "uint32"})["d_"]
        for value, d in zip(a.tolist(), found.tolist(), strict=True):
            assert value_of(d, "f32") == rounded(Fraction(value), "f32", mode)


@pytest.mark.parametrize("mode", ["rn", "rz"])
@pytest.mark.parametrize(("wide", "narrow"), [("f32", "f16"), ("f32", "bf16"), ("f64", "f32"), ("f64", "f16")])
def test_narrowing(wide, narrow, mode):
    a = operands(wide, 1, 600)[0]
    ties = RANDOM.integers(0, 2**16, 100, dtype=np.uint32) << np.uint32(16) | np.uint32(0x8000)
    if wide == "f32":
        a = np.concatenate((a, ties, ties + 1, ties - 1, RANDOM.normal(size=200).astype("f4").view("u4")))
        a = np.concatenate((a, np.float32([65504, 65519.99, 65520, 2.0**-24, 2.0**-25, 3 * 2.0**-26]).view("u4")))
    found = evaluate(f"cvt.{mode}.{narrow}.{wide} %d_, %a;", {"a": a}, {"d_": DTYPES[narrow]})["d_"]
    for raw, value in zip(a.tolist(), found.tolist(), strict=True):
        x = value_of(raw, wide)
        if math.isfinite(x):
            assert same(value, rounded(Fraction(x), narrow, mode, math.copysign(1, x) < 0), narrow), x
        else:
            assert same(value, x, narrow)


def test_pairs_of_conversions():
    a, b = (RANDOM.normal(size=200).astype("f4") for _ in range(2))
    text = "cvt.rn.f16x2.f32 %d_, %a, %b;\ncvt.rn.bf16x2.f32 %e_, %a, %b;\ncvt.rn.relu.f16x2.f32 %f_, %a, %b;"
    found = evaluate(text, {"a": a.view("u4"), "b": b.view("u4")}, dict.fromkeys(("d_", "e_", "f_"), "uint32"))
    for x, y, d, e, f in zip(a.tolist(), b.tolist(), *[found[n].tolist() for n in found], strict=True):
        # The first operand is the upper half.
        assert value_of(d >> 16, "f16") == rounded(Fraction(x), "f16")
        assert value_of(d & 0xFFFF, "f16") == rounded(Fraction(y), "f16")
        assert value_of(e >> 16, "bf16") == rounded(Fraction(x), "bf16")
        assert value_of(e & 0xFFFF, "bf16") == rounded(Fraction(y), "bf16")
        assert value_of(f >> 16, "f16") == max(rounded(Fraction(x), "f16"), 0)


def test_widening_and_whole_floats():
    half = np.arange(65536, dtype=np.uint16)
    found = evaluate("cvt.f32.f16 %d_, %a;\ncvt.f32.bf16 %e_, %a;", {"a": half}, {"d_": "uint32", "e_": "uint32"})
    for raw, d, e in zip(half[::7].tolist(), found["d_"][::7].tolist(), found["e_"][::7].tolist(), strict=True):
        assert same(d, value_of(raw, "f16"), "f32")
        assert same(e, value_of(raw, "bf16"), "f32")
    a = RANDOM.uniform(-5, 5, 200).astype("f4")
    a[:4] = 0.5, 1.5, 2.5, -0.5
    text = "\n".join(f"cvt.{mode}.f32.f32 %{mode}_, %a;" for mode in ROUND_WHOLE) + "\ncvt.sat.f32.f32 %sat_, %a;"
    found = evaluate(text, {"a": a.view("u4")}, {f"{m}_": "float32" for m in (*ROUND_WHOLE, "sat")})
    for mode, whole in ROUND_WHOLE.items():
        assert found[f"{mode}_"].tolist() == [whole(x) for x in a.tolist()]
    assert found["sat_"].tolist() == [min(max(x, 0), 1) for x in a.tolist()]


def test_integer_conversions():
    a = np.array([0, 1, -1, 127, 128, -128, -129, 255, 256, 32767, -32768, 65535, 2**31 - 1, -(2**31)], "i4")
    text = """
cvt.s32.s8 %d_, %a; cvt.u32.u8 %e_, %a; cvt.s64.s32 %f_, %a; cvt.u64.u32 %g_, %a; cvt.s32.s16 %h_, %a;
cvt.sat.s8.s32 %i_, %a; cvt.sat.u8.s32 %j_, %a; cvt.u16.u32 %k_, %a; cvt.sat.u32.s32 %l_, %a; cvt.s16.s8 %m_, %a;
"""
    dtypes = ["i4", "u4", "i8", "u8", "i4", "i4", "u4", "u2", "u4", "i2"]
    found = evaluate(text, {"a": a}, {f"{n}_": t for n, t in zip("defghijklm", dtypes, strict=True)})

    def low(v, bits):
        v &= 2**bits - 1
        return v - 2**bits if v >> (bits - 1) else v

    rows = list(zip(*[values.tolist() for values in found.values()], strict=True))
    for x, row in zip(a.tolist(), rows, strict=True):
        wanted = [low(x, 8), x & 255, x, x & 0xFFFFFFFF, low(x, 16), min(max(x, -128), 127), min(max(x, 0), 255)]
        assert list(row) == [*wanted, x & 65535, max(x, 0), low(x, 8)]


def test_packing_with_saturation():
    a, b = (RANDOM.integers(-400, 400, 100).astype("i4") for _ in range(2))
    c = RANDOM.integers(0, 2**32, 100, dtype=np.uint32)
    text = """
cvt.pack.sat.s8.s32.b32 %d_, %a, %b, %c;
cvt.pack.sat.u8.s32.b32 %e_, %a, %b, 0;
cvt.pack.sat.s16.s32 %f_, %a, %b;
cvt.pack.sat.s4.s32.b32 %g_, %a, %b, %c;
"""
    found = evaluate(text, {"a": a, "b": b, "c": c}, {f"{n}_": "uint32" for n in "defg"})
    for x, y, z, *row in zip(a.tolist(), b.tolist(), c.tolist(), *[v.tolist() for v in found.values()], strict=True):
        s8 = [min(max(v, -128), 127) & 255 for v in (x, y)]
        u8 = [min(max(v, 0), 255) for v in (x, y)]
        s4 = [min(max(v, -8), 7) & 15 for v in (x, y)]
        wanted = [(z << 16 | s8[0] << 8 | s8[1]) & 0xFFFFFFFF, u8[0] << 8 | u8[1]]
        wanted += [(x & 65535) << 16 | (y & 65535), (z << 8 | s4[0] << 4 | s4[1]) & 0xFFFFFFFF]
        assert row == wanted
