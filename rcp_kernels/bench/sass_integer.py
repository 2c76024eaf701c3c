"""The integer instructions of NVIDIA's machine code, on lanes: what addresses, loops and branches are computed by.

NVIDIA documents the names of these instructions ("CUDA Binary Utilities", instruction set reference), not their
meaning; what is here was inferred from compiled code whose result is known, and is checked by counts that must come out
(tests/test_sass_report.py): each weight byte loaded once, one tensor instruction for 512 weights.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .sass import Instruction
from .sass_lanes import (
    ALL,
    FULL,
    MASK,
    Bits,
    Bools,
    Lanes,
    Results,
    Unknown,
    Value,
    is_predicate,
    is_register,
    nothing,
    signed,
    targets_of,
)

Handler = Callable[[Lanes, Instruction, Bools], Results]
HANDLERS: dict[str, Handler] = {}


def _handles(*names: str) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        for name in names:
            HANDLERS[name] = HANDLERS[f"U{name}"] = handler
        return handler

    return register


def _one(instruction: Instruction, bits: Bits, *sources: Value) -> Results:
    known = np.logical_and.reduce([FULL, *(source.known for source in sources)])
    return [(targets_of(instruction)[0][0], Value(bits & MASK, known))]


def _split(instruction: Instruction, sources: list[str]) -> tuple[list[str], list[str]]:
    """Sources without and with the predicates that follow them."""
    count = len(sources)
    while count and is_predicate(sources[count - 1]):
        count -= 1
    return sources[:count], sources[count:]


@_handles("MOV")
def _mov(lanes: Lanes, i: Instruction, _active: Bools) -> Results:
    registers, _, sources = targets_of(i)
    return list(zip(registers, lanes.read_words(sources[0], len(registers)), strict=True))


@_handles("LDC", "LDCU", "R2UR", "CS2R", "S2R", "S2UR")
def _move_in(lanes: Lanes, i: Instruction, _active: Bools) -> Results:
    registers, predicates, sources = targets_of(i)
    if i.name.startswith(("S2", "CS2", "US2", "UCS2")):
        if sources[0] == "SRZ":
            return [(register, Value(np.zeros(32, np.int64), FULL)) for register in registers]
        return [(registers[0], Value(lanes.special(sources[0]), FULL))]
    if predicates or "U8" in i.modifiers or "U16" in i.modifiers:
        if predicates or not sources[0].startswith("c["):
            raise Unknown
        value = lanes.constant(sources[0])
        return [(registers[0], Value(value.bits & (0xFF if "U8" in i.modifiers else 0xFFFF), value.known))]
    return list(zip(registers, lanes.read_words(sources[0], len(registers)), strict=True))


HANDLERS["ULDC"] = _move_in


@_handles("IADD3", "IADD", "VIADD")
def _add(lanes: Lanes, i: Instruction, _active: Bools) -> Results:
    registers, predicates, sources = targets_of(i)
    sources, carries = _split(i, sources)
    if "64" in i.modifiers:
        wide = [lanes.read_wide(source.lstrip("-")) for source in sources]
        total = np.zeros(32, np.int64)
        for source, value in zip(sources, wide, strict=True):
            total += -value.bits if source.startswith("-") else value.bits
        known = np.logical_and.reduce([value.known for value in wide])
        return [(registers[0], Value(total & MASK, known)), (registers[1], Value((total >> 32) & MASK, known))]
    values = [lanes.read(source) for source in sources]
    total = np.zeros(32, np.int64)
    for source, value in zip(sources, values, strict=True):
        # -0 carries, as 2^32 does.
        minus = source.startswith("-") and not source.startswith("-0x")
        total += np.where((value.bits == 0) & minus, 1 << 32, value.bits)
    if "X" in i.modifiers:
        for carry in carries:
            value = lanes.predicate(carry)
            values.append(value)
            total += value.bits
    known = np.logical_and.reduce([FULL, *(value.known for value in values)])
    results = [(registers[0], Value(total & MASK, known))]
    for n, predicate in enumerate(predicates):
        results.append((predicate, Value((total >> 32 > n).astype(np.int64), known)))
    return results


@_handles("IMAD")
def _multiply_add(lanes: Lanes, i: Instruction, _active: Bools) -> Results:
    registers, predicates, sources = targets_of(i)
    (a, b, c), carries = (lambda pair: (pair[0][:3], pair[1]))(_split(i, sources))
    unsigned = "U32" in i.modifiers
    x, y = lanes.read(a), lanes.read(b)
    p, q = (x.bits, y.bits) if unsigned else (signed(x.bits), signed(y.bits))
    if "WIDE" in i.modifiers or "HI" in i.modifiers:
        z = lanes.read_wide(c)
        known = x.known & y.known & z.known
        product = [int(u) * int(v) + (int(w) & (2**64 - 1)) for u, v, w in zip(p, q, z.bits, strict=True)]
        low = np.array([value & MASK for value in product], np.int64)
        high = np.array([value >> 32 & MASK for value in product], np.int64)
        if "HI" in i.modifiers:
            return [(registers[0], Value(high, known))]
        results = [(registers[0], Value(low, known)), (registers[1], Value(high, known))]
        carry = np.array([value >> 64 != 0 for value in product]).astype(np.int64)
        return results + [(predicate, Value(carry, known)) for predicate in predicates]
    z = lanes.read(c)
    total = ((p & MASK) * (q & 0xFFFF) & MASK) + (((p & MASK) * ((q >> 16) & 0xFFFF) & 0xFFFF) << 16) + z.bits
    known = x.known & y.known & z.known
    # A factor of zero or one hides what is not known of nothing else; RZ is known anyway.
    if "X" in i.modifiers:
        for carry_in in carries:
            value = lanes.predicate(carry_in)
            total, known = total + value.bits, known & value.known
    return [(registers[0], Value(total & MASK, known))] + [(predicate, nothing()) for predicate in predicates]


@_handles("LEA")
def _lea(lanes: Lanes, i: Instruction, _active: Bools) -> Results:
    registers, predicates, sources = targets_of(i)
    operands, carries = _split(i, sources)
    shift = int(operands[-1], 0)
    a, b = lanes.read(operands[0].lstrip("-")), lanes.read(operands[1])
    low, known = a.bits, a.known & b.known
    if operands[0].startswith("-"):
        low = -low & MASK
    if "HI" in i.modifiers:
        if "SX32" in i.modifiers:
            high = np.where(low >> 31, MASK, 0)
        else:
            c = lanes.read(operands[2])
            high, known = c.bits, known & c.known
        shifted = ((high << shift) | (low >> (32 - shift) if shift else np.zeros(32, np.int64))) & MASK
    else:
        shifted = (low << shift) & MASK
    total = shifted + b.bits
    if "X" in i.modifiers:
        for carry in carries:
            value = lanes.predicate(carry)
            total, known = total + value.bits, known & value.known
    carry_out = Value((total >> 32 != 0).astype(np.int64), known)
    return [(registers[0], Value(total & MASK, known))] + [(p, carry_out) for p in predicates]


@_handles("SHF", "SHL", "SHR")
def _shift(lanes: Lanes, i: Instruction, _active: Bools) -> Results:
    _, _, sources = targets_of(i)
    a, s, c = lanes.read(sources[0]), lanes.read(sources[1]), lanes.read(sources[2])
    wrap, wide = "W" in i.modifiers, bool({"U64", "S64"} & set(i.modifiers))
    limit = 63 if wide else 31
    # Beyond the width the amount is clamped, or wraps with .W.
    amount = s.bits & limit if wrap else np.minimum(s.bits, limit + 1)
    result = []
    for low, high, n in zip(a.bits, c.bits, amount, strict=True):
        whole = int(low) | int(high) << 32
        if "R" in i.modifiers:
            if {"S32", "S64"} & set(i.modifiers) and whole >> 63:
                whole -= 1 << 64
            shifted = whole >> int(n)
        else:
            shifted = whole << int(n)
        result.append((shifted >> 32 if "HI" in i.modifiers else shifted) & MASK)
    return _one(i, np.array(result, np.int64), a, s, c)


def _look_up(table: int, inputs: list[Bits], mask: int) -> Bits:
    result = np.zeros(32, np.int64)
    for index in range(8):
        if table >> index & 1:
            term = np.full(32, mask)
            for bit, source in zip((4, 2, 1), inputs, strict=True):
                term = term & (source if index & bit else ~source & mask)
            result = result | term
    return result


@_handles("LOP3")
def _lop3(lanes: Lanes, i: Instruction, _active: Bools) -> Results:
    registers, predicates, sources = targets_of(i)
    operands, _ = _split(i, sources)
    values = [lanes.read(operand) for operand in operands[:3]]
    bits = _look_up(int(operands[3], 0), [value.bits for value in values], MASK)
    known = np.logical_and.reduce([value.known for value in values])
    results = [(registers[0], Value(bits, known))] if registers else []
    return results + [(predicate, Value((bits != 0).astype(np.int64), known)) for predicate in predicates]


@_handles("PLOP3")
def _plop3(lanes: Lanes, i: Instruction, _active: Bools) -> Results:
    # Two results, three sources, two tables.
    first, second = i.operands[:2]
    values = [lanes.predicate(operand) for operand in i.operands[2:5]]
    tables = [int(operand, 0) for operand in i.operands[5:7]]
    # A table in which an unknown source does not matter has a known result.
    results = []
    for target, table in zip((first, second), tables, strict=False):
        bits = _look_up(table, [value.bits for value in values], 1)
        known = FULL
        for n, value in enumerate(values):
            if value.known.all():
                continue
            flipped = [1 - other.bits if m == n else other.bits for m, other in enumerate(values)]
            known = known & (value.known | (_look_up(table, flipped, 1) == bits))
        results.append((target, Value(bits, known)))
    return results


_COMPARE: dict[str, Callable[[Bits, Bits], Bools]] = {
    "EQ": np.equal,
    "NE": np.not_equal,
    "LT": np.less,
    "LE": np.less_equal,
    "GT": np.greater,
    "GE": np.greater_equal,
}


@_handles("ISETP")
def _compare(lanes: Lanes, i: Instruction, _active: Bools) -> Results:
    first, second = i.operands[:2]
    sources = i.operands[2:]
    test = next(m for m in i.modifiers if m in _COMPARE)
    if {"U64", "S64", "64"} & set(i.modifiers):
        a, b = lanes.read_wide(sources[0]), lanes.read_wide(sources[1])
        x, y = a.bits, b.bits
    else:
        a, b = lanes.read(sources[0]), lanes.read(sources[1])
        x, y = (a.bits, b.bits) if "U32" in i.modifiers else (signed(a.bits), signed(b.bits))
    result, known = _COMPARE[test](x, y), a.known & b.known
    if "EX" in i.modifiers:  # the high halves, the low ones' result in the last predicate
        low = lanes.predicate(sources[3])
        equal = x == y
        strict = _COMPARE[{"LE": "LT", "GE": "GT"}.get(test, test)](x, y)
        result = (strict & ~equal) | (equal & (low.bits != 0)) if test != "NE" else ~equal | (low.bits != 0)
        known = known & (low.known | ~equal)
    combine = lanes.predicate(sources[2])
    other = combine.bits != 0
    results = []
    for target, mine in ((first, result), (second, ~result)):
        if "AND" in i.modifiers:
            bits, sure = mine & other, (known & combine.known) | (known & ~mine) | (combine.known & ~other)
        elif "OR" in i.modifiers:
            bits, sure = mine | other, (known & combine.known) | (known & mine) | (combine.known & other)
        else:
            bits, sure = mine ^ other, known & combine.known
        results.append((target, Value(bits.astype(np.int64), sure)))
    return results


@_handles("SEL")
def _select(lanes: Lanes, i: Instruction, _active: Bools) -> Results:
    registers, _, sources = targets_of(i)
    a, b, p = lanes.read(sources[0]), lanes.read(sources[1]), lanes.predicate(sources[2])
    known = np.where(p.bits != 0, a.known, b.known) & p.known
    return [(registers[0], Value(np.where(p.bits != 0, a.bits, b.bits), known))]


@_handles("IMNMX", "VIMNMX")
def _minimum(lanes: Lanes, i: Instruction, _active: Bools) -> Results:
    _, _, sources = targets_of(i)
    a, b, p = lanes.read(sources[0]), lanes.read(sources[1]), lanes.predicate(sources[2])
    x, y = (a.bits, b.bits) if "U32" in i.modifiers else (signed(a.bits), signed(b.bits))
    return _one(i, np.where(p.bits != 0, np.minimum(x, y), np.maximum(x, y)), a, b, p)


@_handles("VIADDMNMX")
def _add_minimum(lanes: Lanes, i: Instruction, _active: Bools) -> Results:
    _, _, sources = targets_of(i)
    a, b, c, p = (*(lanes.read(source) for source in sources[:3]), lanes.predicate(sources[3]))
    x, y = signed(a.bits + b.bits), signed(c.bits)
    if "U32" in i.modifiers:
        x, y = x & MASK, y & MASK
    return _one(i, np.where(p.bits != 0, np.minimum(x, y), np.maximum(x, y)), a, b, c, p)


@_handles("IABS")
def _absolute(lanes: Lanes, i: Instruction, _active: Bools) -> Results:
    value = lanes.read(targets_of(i)[2][0])
    return _one(i, np.abs(signed(value.bits)), value)


@_handles("PRMT")
def _permute(lanes: Lanes, i: Instruction, _active: Bools) -> Results:
    _, _, sources = targets_of(i)
    a, s, b = (lanes.read(source) for source in sources[:3])
    if len(i.modifiers) > 0:
        raise Unknown
    both, bits = a.bits | b.bits << 32, np.zeros(32, np.int64)
    for byte in range(4):
        nibble = s.bits >> (4 * byte) & 15
        value = both >> (8 * (nibble & 7)) & 0xFF
        bits |= np.where(nibble & 8, np.where(value >> 7, 0xFF, 0), value) << (8 * byte)
    return _one(i, bits, a, s, b)


@_handles("SGXT", "BMSK")
def _extend(lanes: Lanes, i: Instruction, _active: Bools) -> Results:
    _, _, sources = targets_of(i)
    a, b = lanes.read(sources[0]), lanes.read(sources[1])
    if i.name.endswith("BMSK"):
        return _one(i, ((1 << np.minimum(b.bits, 32)) - 1) << np.minimum(a.bits, 32), a, b)
    width = np.clip(b.bits, 0, 32)
    low = a.bits & ((1 << width) - 1)
    sign = (low >> np.maximum(width - 1, 0)) & 1 if "U32" not in i.modifiers else np.zeros(32, np.int64)
    return _one(i, np.where(sign, low - (1 << width), low), a, b)


@_handles("POPC", "FLO", "BREV")
def _count_bits(lanes: Lanes, i: Instruction, _active: Bools) -> Results:
    value = lanes.read(targets_of(i)[2][0])
    name = i.name.removeprefix("U")
    if name == "POPC":
        bits = [int(v).bit_count() for v in value.bits]
    elif name == "FLO":
        bits = [
            (31 - (int(v).bit_length() - 1) if "SH" in i.modifiers else int(v).bit_length() - 1) for v in value.bits
        ]
    else:
        bits = [int(f"{int(v):032b}"[::-1], 2) for v in value.bits]
    return [(targets_of(i)[0][0], Value(np.array(bits, np.int64) & MASK, value.known))]


@_handles("VOTE", "VOTEU")
def _vote(lanes: Lanes, i: Instruction, active: Bools) -> Results:
    registers = [operand for operand in i.operands[:1] if is_register(operand)]
    predicates = list(i.operands[len(registers) : -1])
    p = lanes.predicate(i.operands[-1])
    ballot = int(sum(1 << int(lane) for lane in np.flatnonzero(active & (p.bits != 0))))
    agreed = all(p.bits[active]) if "ALL" in i.modifiers else any(p.bits[active])
    known = np.full(32, bool(p.known[active].all()))
    results = [(register, Value(np.full(32, ballot), known)) for register in registers]
    return results + [(predicate, Value(np.full(32, int(agreed)), known)) for predicate in predicates]


@_handles("SHFL")
def _shuffle(lanes: Lanes, i: Instruction, _active: Bools) -> Results:
    registers, predicates, sources = targets_of(i)
    value, b = lanes.read(sources[0]), lanes.read(sources[1])
    lane = np.arange(32)
    n = b.bits & 31
    if "IDX" in i.modifiers:
        source = n
    elif "BFLY" in i.modifiers:
        source = lane ^ n
    else:
        raise Unknown
    shuffled = Value(value.bits[source], value.known[source] & b.known)
    return [(registers[0], shuffled), *((predicate, Value(ALL, FULL)) for predicate in predicates)]


@_handles("P2R")
def _predicates_to_register(lanes: Lanes, i: Instruction, _active: Bools) -> Results:
    mask = int(targets_of(i)[2][-1], 0)
    bits, known = np.zeros(32, np.int64), FULL
    for n in range(7):
        if mask >> n & 1:
            value = lanes.predicate(f"P{n}")
            bits, known = bits | value.bits << n, known & value.known
    return [(i.operands[0], Value(bits, known))]


@_handles("R2P")
def _register_to_predicates(lanes: Lanes, i: Instruction, _active: Bools) -> Results:
    sources = [operand for operand in i.operands if operand != "PR"]
    value, mask = lanes.read(sources[0]), int(sources[-1], 0)
    return [(f"P{n}", Value(value.bits >> n & 1, value.known)) for n in range(7) if mask >> n & 1]


# Division by a number that is not constant goes through float32; the code corrects a quotient that is one too small.
@_handles("I2F")
def _to_float(lanes: Lanes, i: Instruction, _active: Bools) -> Results:
    value = lanes.read(targets_of(i)[2][0])
    if not {"RP", "U32", "S32"} & set(i.modifiers) and i.modifiers:
        raise Unknown
    exact = (value.bits if "U32" in i.modifiers else signed(value.bits)).astype(np.float64)
    rounded = exact.astype(np.float32)
    if "RP" in i.modifiers:
        rounded = np.where(rounded < exact, np.nextafter(rounded, np.float32(np.inf)), rounded)
    return _one(i, rounded.astype(np.float32).view(np.uint32).astype(np.int64), value)


@_handles("MUFU")
def _reciprocal(lanes: Lanes, i: Instruction, _active: Bools) -> Results:
    value = lanes.read(targets_of(i)[2][0])
    if i.modifiers != ["RCP"]:
        raise Unknown
    with np.errstate(all="ignore"):
        result = np.float32(1) / value.bits.astype(np.uint32).view(np.float32)
    return _one(i, result.astype(np.float32).view(np.uint32).astype(np.int64), value)


@_handles("F2I")
def _to_integer(lanes: Lanes, i: Instruction, _active: Bools) -> Results:
    value = lanes.read(targets_of(i)[2][0])
    if "TRUNC" not in i.modifiers:
        raise Unknown
    with np.errstate(all="ignore"):
        number = value.bits.astype(np.uint32).view(np.float32).astype(np.float64)
        low, high = (0, 2**32 - 1) if "U32" in i.modifiers else (-(2**31), 2**31 - 1)
        result = np.clip(np.trunc(np.nan_to_num(number)), low, high).astype(np.int64)
    return _one(i, result, value)
