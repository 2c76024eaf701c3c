"""Floating-point instructions of the executor against exact fractions, rounded once."""

import math
from fractions import Fraction

import numpy as np
import pytest
from ptx.bench import evaluate
from ptx_floats import DTYPES, FORMATS, operands, rounded, same, value_of

RANDOM = np.random.default_rng(5)


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
