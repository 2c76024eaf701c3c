"""Integer instructions of the executor against Python's integers."""

import itertools

import numpy as np
import pytest
from ptx.bench import evaluate

RANDOM = np.random.default_rng(4)


def signed(value: int, bits: int) -> int:
    value &= 2**bits - 1
    return value - 2**bits if value >> (bits - 1) else value


def samples(dtypes: str, count: int = 300) -> list[np.ndarray]:
    """Operands: all combinations of some edge cases, or as many as fit, and random ones."""
    columns = []
    for dtype in dtypes.split():
        info = np.iinfo(dtype)
        half = 1 << (info.bits // 2)
        edges = {0, 1, 2, info.max, info.min, info.max - 1, info.max // 2 + 1, half, half - 1, info.bits, info.bits - 1}
        if info.min < 0:
            edges |= {-1, -2, info.min + 1, -half}
        columns.append(sorted(edges))
    rows = list(itertools.product(*columns))
    RANDOM.shuffle(rows)
    rows = rows[: count // 2]
    for _ in range(count - len(rows)):
        row = []
        for dtype in dtypes.split():
            info = np.iinfo(dtype)
            value = int(RANDOM.integers(info.min, info.max, dtype=dtype, endpoint=True))
            # Small ones too, or shifts and lengths would nearly always be out of range.
            row.append(value >> int(RANDOM.integers(0, info.bits)))
        rows.append(tuple(row))
    return [np.array(column, dtype) for column, dtype in zip(zip(*rows, strict=True), dtypes.split(), strict=True)]


def check(instruction: str, dtypes: str, result: str, reference) -> None:
    operands = samples(dtypes)
    names = "abcd"[: len(operands)]
    text = f"{instruction} %d_, {', '.join('%' + name for name in names)};"
    found = evaluate(text, dict(zip(names, operands, strict=True)), {"d_": result})["d_"]
    info = np.iinfo(result)
    for row, value in zip(zip(*[o.tolist() for o in operands], strict=True), found.tolist(), strict=True):
        wanted = reference(*row) & (2**info.bits - 1)
        assert value & (2**info.bits - 1) == wanted, f"{instruction} of {row}: {value} instead of {wanted}"


def quotient(a: int, b: int) -> int:
    return -1 if b == 0 else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def clamp(value: int, low: int, high: int) -> int:
    return max(low, min(high, value))


ARITHMETIC = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul.lo": lambda a, b: a * b,
    "min": min,
    "max": max,
    "div": quotient,
    "rem": lambda a, b: a if b == 0 else a - b * quotient(a, b),
}


@pytest.mark.parametrize("bits", [16, 32, 64])
@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic(name, bits):
    for kind, dtype in (("s", f"int{bits}"), ("u", f"uint{bits}")):
        check(f"{name}.{kind}{bits}", f"{dtype} {dtype}", dtype, ARITHMETIC[name])


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_products(bits):
    for kind, dtype in (("s", f"int{bits}"), ("u", f"uint{bits}")):
        two, three = f"{dtype} {dtype}", f"{dtype} {dtype} {dtype}"
        check(f"mul.hi.{kind}{bits}", two, dtype, lambda a, b: a * b >> bits)
        check(f"mad.lo.{kind}{bits}", three, dtype, lambda a, b, c: a * b + c)
        check(f"mad.hi.{kind}{bits}", three, dtype, lambda a, b, c: (a * b >> bits) + c)
        if bits < 64:
            wide = dtype.replace(str(bits), str(2 * bits))
            check(f"mul.wide.{kind}{bits}", two, wide, lambda a, b: a * b)
            check(f"mad.wide.{kind}{bits}", f"{two} {wide}", wide, lambda a, b, c: a * b + c)


def test_24_bit_products():
    def low(a):
        return signed(a, 24)

    check("mul24.lo.s32", "int32 int32", "int32", lambda a, b: low(a) * low(b))
    check("mul24.hi.s32", "int32 int32", "int32", lambda a, b: low(a) * low(b) >> 16)
    check("mul24.lo.u32", "uint32 uint32", "uint32", lambda a, b: (a & 0xFFFFFF) * (b & 0xFFFFFF))
    check("mad24.lo.u32", "uint32 uint32 uint32", "uint32", lambda a, b, c: (a & 0xFFFFFF) * (b & 0xFFFFFF) + c)


def test_saturation_and_magnitudes():
    check("add.sat.s32", "int32 int32", "int32", lambda a, b: clamp(a + b, -(2**31), 2**31 - 1))
    check("sub.sat.s32", "int32 int32", "int32", lambda a, b: clamp(a - b, -(2**31), 2**31 - 1))
    check("sad.s32", "int32 int32 int32", "int32", lambda a, b, c: c + abs(a - b))
    check("sad.u32", "uint32 uint32 uint32", "uint32", lambda a, b, c: c + abs(a - b))
    for bits in (16, 32, 64):
        check(f"abs.s{bits}", f"int{bits}", f"int{bits}", abs)
        check(f"neg.s{bits}", f"int{bits}", f"int{bits}", lambda a: -a)


def test_pairs():
    def pair(function):
        return lambda a, b: sum((function(signed(a >> s, 16), signed(b >> s, 16)) & 0xFFFF) << s for s in (0, 16))

    check("max.s16x2", "uint32 uint32", "uint32", pair(max))
    check("min.s16x2", "uint32 uint32", "uint32", pair(min))


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_logic(bits):
    dtype = f"uint{bits}"
    check(f"and.b{bits}", f"{dtype} {dtype}", dtype, lambda a, b: a & b)
    check(f"or.b{bits}", f"{dtype} {dtype}", dtype, lambda a, b: a | b)
    check(f"xor.b{bits}", f"{dtype} {dtype}", dtype, lambda a, b: a ^ b)
    check(f"not.b{bits}", dtype, dtype, lambda a: ~a)
    check(f"cnot.b{bits}", dtype, dtype, lambda a: a == 0)


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_shifts(bits):
    check(f"shl.b{bits}", f"uint{bits} uint32", f"uint{bits}", lambda a, b: a << b if b < bits else 0)
    check(f"shr.u{bits}", f"uint{bits} uint32", f"uint{bits}", lambda a, b: a >> b if b < bits else 0)
    check(f"shr.s{bits}", f"int{bits} uint32", f"int{bits}", lambda a, b: a >> min(b, bits))


@pytest.mark.parametrize("amount", [0, 1, 31, 32, 100])
def test_shifts_by_constants(amount):
    (a,) = samples("uint32")
    text = f"shl.b32 %d_, %a, {amount};\nshr.s32 %e_, %a, {amount};"
    found = evaluate(text, {"a": a}, {"d_": "uint32", "e_": "int32"})
    assert found["d_"].tolist() == [v << amount & 0xFFFFFFFF for v in a.tolist()]
    assert found["e_"].tolist() == [signed(v, 32) >> amount for v in a.tolist()]


def test_funnel_shifts():
    def funnel(direction, mode):
        def reference(a, b, c):
            amount = c & 31 if mode == "wrap" else min(c, 32)
            both = b << 32 | a
            return both >> amount if direction == "r" else both << amount >> 32

        return reference

    for direction, mode in itertools.product("lr", ("wrap", "clamp")):
        check(f"shf.{direction}.{mode}.b32", "uint32 uint32 uint32", "uint32", funnel(direction, mode))


def test_every_table_of_lop3():
    a, b, c = (np.array([value], np.uint32) for value in (0xF0F0F0F0, 0xCCCCCCCC, 0xAAAAAAAA))
    noise = RANDOM.integers(0, 2**32, (3, 7), dtype=np.uint32)
    inputs = {name: np.concatenate((x, y)) for name, x, y in zip("abc", (a, b, c), noise, strict=True)}
    for first in range(0, 256, 32):
        tables = range(first, first + 32)
        text = "\n".join(f"lop3.b32 %d{t}_, %a, %b, %c, {t:#x};" for t in tables)
        found = evaluate(text, inputs, {f"d{t}_": "uint32" for t in tables})
        for table in tables:
            # The three constants are the columns of the truth table, so the result is the table, four times.
            assert found[f"d{table}_"][0] == table * 0x01010101
            for x, y, z, value in zip(*[inputs[n].tolist() for n in "abc"], found[f"d{table}_"].tolist(), strict=True):
                bits = [table >> ((x >> i & 1) * 4 + (y >> i & 1) * 2 + (z >> i & 1)) & 1 for i in range(32)]
                assert value == sum(bit << i for i, bit in enumerate(bits))


def permuted(a: int, b: int, choices: list[int]) -> int:
    both, result = b << 32 | a, 0
    for place, choice in enumerate(choices):
        byte = both >> 8 * (choice & 7) & 0xFF
        if choice & 8:
            byte = 0xFF if byte & 0x80 else 0
        result |= byte << 8 * place
    return result


PRMT_TABLES = {
    # As the PTX ISA prints them, d.b3 first.
    "f4e": ["3210", "4321", "5432", "6543", "7654", "0765", "1076", "2107"],
    "b4e": ["5670", "6701", "7012", "0123", "1234", "2345", "3456", "4567"],
    "rc8": ["0000", "1111", "2222", "3333"],
    "ecl": ["3210", "3211", "3222", "3333"],
    "ecr": ["0000", "1110", "2210", "3210"],
    "rc16": ["1010", "3232", "1010", "3232"],
}


def test_prmt():
    check(
        "prmt.b32",
        "uint32 uint32 uint32",
        "uint32",
        lambda a, b, c: permuted(a, b, [c >> 4 * i & 15 for i in range(4)]),
    )
    (a, b) = samples("uint32 uint32")
    for mode, table in PRMT_TABLES.items():
        for selector, word in enumerate(table):
            found = evaluate(f"prmt.b32.{mode} %d_, %a, %b, {selector};", {"a": a, "b": b}, {"d_": "uint32"})["d_"]
            choices = [int(digit) for digit in reversed(word)]
            assert found.tolist() == [permuted(x, y, choices) for x, y in zip(a.tolist(), b.tolist(), strict=True)]


@pytest.mark.parametrize("bits", [32, 64])
def test_bit_fields(bits):
    def extract_unsigned(a, b, c):
        return (a >> (b & 255)) & ((1 << (c & 255)) - 1)

    def extract_signed(a, b, c):
        # The pseudocode of the PTX ISA.
        raw, position, length = a & (2**bits - 1), b & 255, c & 255
        top = min(position + length - 1, bits - 1)
        sign = 0 if length == 0 else raw >> top & 1
        return sum(
            (raw >> (position + i) & 1 if i < length and position + i < bits else sign) << i for i in range(bits)
        )

    def insert(a, b, c, d):
        position, length = c & 255, d & 255
        mask = ((1 << length) - 1) << position
        return (b & ~mask) | (a << position & mask)

    dtype = f"int{bits}"
    check(f"bfe.u{bits}", f"u{dtype} uint32 uint32", f"u{dtype}", extract_unsigned)
    check(f"bfe.s{bits}", f"{dtype} uint32 uint32", dtype, extract_signed)
    check(f"bfi.b{bits}", f"u{dtype} u{dtype} uint32 uint32", f"u{dtype}", insert)


@pytest.mark.parametrize("bits", [32, 64])
def test_counting(bits):
    dtype = f"uint{bits}"
    check(f"popc.b{bits}", dtype, "uint32", lambda a: a.bit_count())
    check(f"clz.b{bits}", dtype, "uint32", lambda a: bits - a.bit_length())
    check(f"brev.b{bits}", dtype, dtype, lambda a: int(f"{a:0{bits}b}"[::-1], 2))
    check(f"bfind.u{bits}", dtype, "uint32", lambda a: a.bit_length() - 1)
    check(f"bfind.s{bits}", f"int{bits}", "uint32", lambda a: (~a if a < 0 else a).bit_length() - 1)
    check(f"bfind.shiftamt.u{bits}", dtype, "uint32", lambda a: bits - a.bit_length() if a else -1)


def test_dot_products():
    def bytes_of(value, is_signed):
        return [signed(value >> 8 * i, 8) if is_signed else value >> 8 * i & 255 for i in range(4)]

    def halves_of(value, is_signed):
        return [signed(value >> 16 * i, 16) if is_signed else value >> 16 * i & 65535 for i in range(2)]

    for x, y in itertools.product("su", repeat=2):
        result = "uint32" if x == y == "u" else "int32"
        types = f"uint32 uint32 {result}"

        def four(a, b, c, x=x, y=y):
            return c + sum(p * q for p, q in zip(bytes_of(a, x == "s"), bytes_of(b, y == "s"), strict=True))

        check(f"dp4a.{x}32.{y}32", types, result, four)
        for half in ("lo", "hi"):

            def two(a, b, c, x=x, y=y, half=half):
                chosen = bytes_of(b, y == "s")[:2] if half == "lo" else bytes_of(b, y == "s")[2:]
                return c + sum(p * q for p, q in zip(halves_of(a, x == "s"), chosen, strict=True))

            check(f"dp2a.{half}.{x}32.{y}32", types, result, two)


@pytest.mark.parametrize("bits", [32, 64])
def test_carries(bits):
    """Numbers of twice the width, added and subtracted in two steps."""
    a0, a1, b0, b1 = samples(" ".join([f"uint{bits}"] * 4))
    text = f"""
add.cc.u{bits} %d0_, %a0, %b0;
addc.u{bits} %d1_, %a1, %b1;
sub.cc.u{bits} %e0_, %a0, %b0;
subc.u{bits} %e1_, %a1, %b1;
"""
    inputs = {"a0": a0, "a1": a1, "b0": b0, "b1": b1}
    found = evaluate(text, inputs, dict.fromkeys(("d0_", "d1_", "e0_", "e1_"), f"uint{bits}"))
    lists = [x.tolist() for x in (a0, a1, b0, b1, found["d0_"], found["d1_"], found["e0_"], found["e1_"])]
    for x0, x1, y0, y1, d0, d1, e0, e1 in zip(*lists, strict=True):
        x, y = x1 << bits | x0, y1 << bits | y0
        assert d1 << bits | d0 == (x + y) % 4**bits
        assert e1 << bits | e0 == (x - y) % 4**bits


COMPARISONS = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_comparisons(bits):
    (a, b) = samples(f"int{bits} int{bits}")
    b[::3] = a[::3]
    unsigned = [x.view(f"uint{bits}").tolist() for x in (a, b)]
    names = {"lt": "lo", "le": "ls", "gt": "hi", "ge": "hs"}
    for name, compare in COMPARISONS.items():
        text = f"setp.{name}.s{bits} %p1, %a, %b;\nselp.u32 %d_, 1, 0, %p1;\n"
        text += (
            f"setp.{names.get(name, name)}.u{bits} %p1|%p2, %a, %b;\nselp.u32 %e_, 5, 7, %p1;\nselp.u32 %f_, 5, 7, %p2;"
        )
        found = evaluate(text, {"a": a, "b": b}, {"d_": "uint32", "e_": "uint32", "f_": "uint32"})
        assert found["d_"].tolist() == [compare(x, y) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
        assert found["e_"].tolist() == [5 if compare(x, y) else 7 for x, y in zip(*unsigned, strict=True)]
        assert found["f_"].tolist() == [7 if compare(x, y) else 5 for x, y in zip(*unsigned, strict=True)]


def test_comparisons_combined():
    (a, b) = samples("int32 int32")
    text = """
setp.gt.s32 %p1, %b, 0;
setp.lt.and.s32 %p2|%p3, %a, %b, %p1;
setp.lt.or.s32 %p4, %a, %b, !%p1;
setp.lt.xor.s32 %p5, %a, %b, %p1;
selp.u32 %r1, 1, 0, %p2;
selp.u32 %r2, 2, 0, %p3;
selp.u32 %r3, 4, 0, %p4;
selp.u32 %r4, 8, 0, %p5;
or.b32 %r1, %r1, %r2;
or.b32 %r3, %r3, %r4;
or.b32 %d_, %r1, %r3;
and.pred %p6, %p2, %p4;
not.pred %p6, %p6;
set.lt.u32.s32 %e_, %a, %b;
slct.u32.s32 %f_, %a, 9, %b;
selp.u32 %g_, 1, 0, %p6;
"""
    found = evaluate(text, {"a": a, "b": b}, {"d_": "uint32", "e_": "int32", "f_": "int32", "g_": "uint32"})
    for x, y, *values in zip(
        a.tolist(), b.tolist(), *[found[n].tolist() for n in ("d_", "e_", "f_", "g_")], strict=True
    ):
        less, positive = x < y, y > 0
        bits = (less and positive, not less and positive, less or not positive, less != positive)
        flags = sum(int(bit) << i for i, bit in enumerate(bits))
        assert values == [flags, -less, x if y >= 0 else 9, not (bits[0] and bits[2])]
