"""Floating-point instructions of the executor against exact fractions, rounded once."""

import math
from fractions import Fraction

import numpy as np
import pytest
from ptx.bench import evaluate

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


def check(instruction: str, name: str, count: int, reference) -> None:
    """reference: exact values (finite, as fractions) -> (Fraction, sign of an exact zero) or a float."""
    columns = operands(name, count)
    names = "abc"[:count]
    text = f"{instruction} %d_, {', '.join('%' + n for n in names)};"
    found = evaluate(text, dict(zip(names, columns, strict=True)), {"d_": DTYPES[name]})["d_"]
    for row, value in zip(zip(*[c.tolist() for c in columns], strict=True), found.tolist(), strict=True):
        values = [value_of(bits, name) for bits in row]
        wanted = reference(*values)
        assert same(value, wanted, name), f"{instruction} of {values}: {value_of(value, name)} instead of {wanted}"


def add(name: str, mode: str = "rn"):
    def reference(a: float, b: float) -> float:
        if not (math.isfinite(a) and math.isfinite(b)):
            return a + b
        exact = Fraction(a) + Fraction(b)
        if exact == 0:
            both = math.copysign(1, a) < 0 and math.copysign(1, b) < 0
            return (
                -0.0
                if both or (mode == "rm" and not (a == b == 0 and math.copysign(1, a) == math.copysign(1, b)))
                else 0.0
            )
        return rounded(exact, name, mode)

    return reference


def multiply(name: str, mode: str = "rn"):
    def reference(a: float, b: float) -> float:
        if not (math.isfinite(a) and math.isfinite(b)):
            return a * b
        negative = math.copysign(1, a) != math.copysign(1, b)
        result = rounded(Fraction(a) * Fraction(b), name, mode, negative)
        return math.copysign(result, -1 if negative else 1)

    return reference


def fused(name: str, mode: str = "rn"):
    def reference(a: float, b: float, c: float) -> float:
        if not (math.isfinite(a) and math.isfinite(b)):
            return a * b + c
        if not math.isfinite(c):
            return c
        exact = Fraction(a) * Fraction(b) + Fraction(c)
        if exact == 0:
            negative = math.copysign(1, a) != math.copysign(1, b)
            if a == 0 or b == 0:
                return -0.0 if negative and math.copysign(1, c) < 0 else 0.0
            return 0.0
        return rounded(exact, name, mode)

    return reference


@pytest.mark.parametrize("name", FORMATS)
def test_sums_and_products(name):
    check(f"add.rn.{name}", name, 2, add(name))
    check(f"sub.rn.{name}", name, 2, lambda a, b: add(name)(a, -b))
    check(f"mul.rn.{name}", name, 2, multiply(name))
    check(f"fma.rn.{name}", name, 3, fused(name))


@pytest.mark.parametrize("mode", ["rz", "rm", "rp"])
def test_directed_rounding(mode):
    columns = operands("f32", 3)
    inputs = dict(zip("abc", columns, strict=True))
    for instruction, reference, count in (("add", add, 2), ("mul", multiply, 2), ("fma", fused, 3)):
        text = f"{instruction}.{mode}.f32 %d_, {', '.join('%' + n for n in 'abc'[:count])};"
        found = evaluate(text, inputs, {"d_": "uint32"})["d_"].tolist()
        for row, value in zip(zip(*[c.tolist() for c in columns[:count]], strict=True), found, strict=True):
            values = [value_of(bits, "f32") for bits in row]
            wanted = reference("f32", mode)(*values)
            result = value_of(value, "f32")
            # Signs of zeros that appear in rounding down are not looked at.
            assert result == wanted or (math.isnan(result) and math.isnan(wanted)), (instruction, values)


def test_fma_where_two_roundings_would_differ():
    """a * b + c halfway between two float32 but for a tail that float64 has no digits for."""
    count = 2000
    a = (1 + RANDOM.integers(0, 2**23, count) / 2**23).astype(np.float32)
    b = (1 + RANDOM.integers(0, 2**23, count) / 2**23).astype(np.float32)
    product = [Fraction(float(x)) * Fraction(float(y)) for x, y in zip(a, b, strict=True)]
    # c such that a * b + c is close to a float32 plus half a unit in its last place
    c = np.array([-float(rounded(p, "f32")) * 2.0**-24 for p in product], np.float32)
    big = np.array([2.0**e for e in RANDOM.integers(24, 60, count)], np.float32)
    inputs = {"a": np.concatenate((a, big)), "b": np.concatenate((b, np.full(count, 1 + 2**-23, np.float32)))}
    inputs["c"] = np.concatenate((c, RANDOM.choice([1.0, -1.0, 2.0**-30, -(2.0**-30)], count).astype(np.float32)))
    # halves: a * b = big + big 2^-23, c decides nothing or everything
    found = evaluate("fma.rn.f32 %d_, %a, %b, %c;", {k: v.view("u4") for k, v in inputs.items()}, {"d_": "uint32"})[
        "d_"
    ]
    twice = (inputs["a"].astype("f8") * inputs["b"] + inputs["c"]).astype("f4")
    differences = 0
    for x, y, z, value, other in zip(
        *[v.tolist() for v in inputs.values()], found.view("f4").tolist(), twice.tolist(), strict=True
    ):
        wanted = rounded(Fraction(x) * Fraction(y) + Fraction(z), "f32")
        assert value == wanted
        differences += other != wanted
    tie = {"a": 1 + 2.0**-12, "b": 1 + 2.0**-12, "c": 2.0**-60}
    tie["a"], tie["b"] = 2.0**12 + 1, 2.0**12 + 1  # 2^24 + 2^13 + 1: one bit too many
    one = {k: np.array([v], "f4").view("u4") for k, v in tie.items()}
    assert evaluate("fma.rn.f32 %d_, %a, %b, %c;", one, {"d_": "uint32"})["d_"].view("f4")[0] == 2**24 + 2**13 + 2
    one["c"] = np.array([-(2.0**-60)], "f4").view("u4")
    assert evaluate("fma.rn.f32 %d_, %a, %b, %c;", one, {"d_": "uint32"})["d_"].view("f4")[0] == 2**24 + 2**13


def test_subnormal_results():
    a = RANDOM.integers(0, 2**24, 500, dtype=np.uint32) | np.uint32(0x1F800000)
    b = RANDOM.integers(0, 2**24, 500, dtype=np.uint32) | np.uint32(0x1F000000)
    c = RANDOM.integers(0, 2**23, 500, dtype=np.uint32)
    text = "fma.rn.f32 %d_, %a, %b, %c;\nmul.rn.ftz.f32 %e_, %a, %b;\nadd.ftz.f32 %f_, %c, %a;"
    found = evaluate(text, {"a": a, "b": b, "c": c}, {"d_": "uint32", "e_": "uint32", "f_": "uint32"})
    for x, y, z, d, e, f in zip(*[v.tolist() for v in (a, b, c)], *[found[n].tolist() for n in found], strict=True):
        x, y, z = (value_of(bits, "f32") for bits in (x, y, z))
        assert value_of(d, "f32") == rounded(Fraction(x) * Fraction(y) + Fraction(z), "f32")
        product = rounded(Fraction(x) * Fraction(y), "f32")
        assert value_of(e, "f32") == (0 if abs(product) < 2.0**-126 else product)
        assert value_of(f, "f32") == x


@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_pairs(name):
    a, b, c = (operands(name, 1, 256)[0] for _ in range(3))
    halves = {"a": a.view("u4"), "b": b.view("u4"), "c": c.view("u4")}
    x2 = f"{name}x2"
    text = f"""
add.rn.{x2} %d_, %a, %b; mul.rn.{x2} %e_, %a, %b; fma.rn.{x2} %f_, %a, %b, %c;
abs.{x2} %g_, %a; neg.{x2} %h_, %a; max.{x2} %i_, %a, %b; min.NaN.{x2} %j_, %a, %b;
fma.rn.relu.{x2} %k_, %a, %b, %c;
"""
    found = evaluate(text, halves, {f"{n}_": "uint32" for n in "defghijk"})
    results = [found[f"{n}_"].view("u2").tolist() for n in "defghijk"]
    for x, y, z, *bits in zip(a.tolist(), b.tolist(), c.tolist(), *results, strict=True):
        assert bits[3] == x & 0x7FFF
        assert bits[4] == x ^ 0x8000
        x, y, z = (value_of(v, name) for v in (x, y, z))
        assert same(bits[0], add(name)(x, y), name)
        assert same(bits[1], multiply(name)(x, y), name)
        total = fused(name)(x, y, z)
        assert same(bits[2], total, name)
        larger = y if math.isnan(x) else x if math.isnan(y) else max(x, y, key=lambda v: (v, math.copysign(1, v)))
        smaller = (
            math.nan
            if math.isnan(x + y) and (math.isnan(x) or math.isnan(y))
            else min(x, y, key=lambda v: (v, math.copysign(1, v)))
        )
        assert same(bits[5], larger, name)
        assert same(bits[6], smaller, name)
        assert value_of(bits[7], name) == max(total, 0.0) or math.isnan(total)


def test_minimum_and_maximum_of_float32():
    a, b = operands("f32", 2)
    text = "min.f32 %d_, %a, %b; max.f32 %e_, %a, %b; max.NaN.f32 %f_, %a, %b;"
    found = evaluate(text, {"a": a, "b": b}, dict.fromkeys(("d_", "e_", "f_"), "uint32"))

    def key(v):
        return (v, math.copysign(1, v))

    for x, y, d, e, f in zip(a.tolist(), b.tolist(), *[found[n].tolist() for n in found], strict=True):
        x, y = value_of(x, "f32"), value_of(y, "f32")
        numbers = [v for v in (x, y) if not math.isnan(v)]
        assert same(d, min(numbers, key=key, default=math.nan), "f32")
        assert same(e, max(numbers, key=key, default=math.nan), "f32")
        assert same(f, max(x, y, key=key) if len(numbers) == 2 else math.nan, "f32")


def test_division_and_roots():
    a, b = operands("f32", 2)
    text = "div.rn.f32 %d_, %a, %b; sqrt.rn.f32 %e_, %a; rcp.rn.f32 %f_, %b; div.full.f32 %g_, %a, %b;"
    found = evaluate(text, {"a": a, "b": b}, dict.fromkeys(("d_", "e_", "f_", "g_"), "uint32"))
    for x, y, d, e, f, g in zip(a.tolist(), b.tolist(), *[found[n].tolist() for n in found], strict=True):
        x, y = value_of(x, "f32"), value_of(y, "f32")
        if math.isfinite(x) and math.isfinite(y) and y != 0 and x != 0:
            assert value_of(d, "f32") == rounded(Fraction(x) / Fraction(y), "f32")
            assert value_of(f, "f32") == rounded(1 / Fraction(y), "f32")
            assert g == d
        if math.isfinite(x) and x > 0:
            root = value_of(e, "f32")
            below, above = (Fraction(float(np.nextafter(np.float32(root), np.float32(t)))) for t in (-np.inf, np.inf))
            assert ((below + Fraction(root)) / 2) ** 2 <= Fraction(x) <= ((above + Fraction(root)) / 2) ** 2
        elif x < 0:
            assert math.isnan(value_of(e, "f32"))


def test_approximations():
    x = RANDOM.uniform(-8, 8, 400).astype("f4")
    text = """
ex2.approx.f32 %d_, %a; abs.f32 %r5, %a; lg2.approx.f32 %e_, %r5; sin.approx.f32 %f_, %a; cos.approx.f32 %g_, %a;
tanh.approx.f32 %h_, %a; rsqrt.approx.f32 %i_, %r5; rcp.approx.ftz.f32 %j_, %a; sqrt.approx.f32 %k_, %r5;
"""
    found = evaluate(text, {"a": x.view("u4")}, {f"{n}_": "float32" for n in "defghijk"})
    wide = x.astype("f8")
    wanted = [np.exp2(wide), np.log2(abs(wide)), np.sin(wide), np.cos(wide), np.tanh(wide), abs(wide) ** -0.5]
    wanted += [1 / wide, abs(wide) ** 0.5]
    for values, reference in zip(found.values(), wanted, strict=True):
        assert (abs(values - reference) <= 1.2e-7 * abs(reference)).all()


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


@pytest.mark.parametrize("name", ["f32", "f16", "bf16", "f64"])
def test_comparisons_with_nan(name):
    a, b = operands(name, 2, 200)
    b[::5] = a[::5]
    ordered = {
        "eq": lambda x, y: x == y,
        "ne": lambda x, y: x != y,
        "lt": lambda x, y: x < y,
        "le": lambda x, y: x <= y,
        "gt": lambda x, y: x > y,
        "ge": lambda x, y: x >= y,
    }
    names = [*ordered, *(f"{n}u" for n in ordered), "num", "nan"]
    text = "\n".join(f"setp.{n}.{name} %p1, %a, %b;\nselp.u32 %{n}_, 1, 0, %p1;" for n in names)
    found = evaluate(text, {"a": a, "b": b}, {f"{n}_": "uint32" for n in names})
    for index, (x, y) in enumerate(zip(a.tolist(), b.tolist(), strict=True)):
        x, y = value_of(x, name), value_of(y, name)
        nan = math.isnan(x) or math.isnan(y)
        for n, compare in ordered.items():
            assert found[f"{n}_"][index] == (not nan and compare(x, y))
            assert found[f"{n}u_"][index] == (nan or compare(x, y))
        assert found["num_"][index] == (not nan)
        assert found["nan_"][index] == nan
