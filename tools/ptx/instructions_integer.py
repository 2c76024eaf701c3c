"""Integer arithmetic, logic, shifts, byte permutation, dot products."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .module import Immediate, Instruction, PtxError
from .operands import DTYPES, binds, elementwise, require, source, target

INTEGERS = {f"{kind}{bits}" for kind in "us" for bits in (16, 32, 64)}
BITS = {"b16", "b32", "b64"}
U64, U32 = np.uint64, np.uint32


def is_integer(instruction: Instruction) -> bool:
    return instruction.modifiers[-1] in INTEGERS | {"u16x2", "s16x2"}


def typed(instruction: Instruction, allowed: tuple[str, ...] = (), types: set[str] = INTEGERS) -> str:
    """The instruction's type, after a check that its modifiers are the type and `allowed` ones."""
    name = instruction.modifiers[-1]
    if name not in types:
        raise PtxError(f"unknown type .{name}")
    require(instruction, allowed, instruction.modifiers[:-1])
    return name


def _saturated_add(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.clip(a.astype(np.int64) + b, -(2**31), 2**31 - 1).astype(np.int32)


def _saturated_subtract(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.clip(a.astype(np.int64) - b, -(2**31), 2**31 - 1).astype(np.int32)


def add_subtract(machine, instruction: Instruction) -> Callable:
    name = typed(instruction, ("sat", "cc"))
    if "cc" in instruction.modifiers:
        return _with_carry(machine, instruction, name, False)
    if "sat" in instruction.modifiers:
        function = _saturated_add if instruction.base == "add" else _saturated_subtract
        return elementwise(machine, instruction, [name, name], name, function)
    function = np.add if instruction.base == "add" else np.subtract
    return elementwise(machine, instruction, [name, name], name, function)


def _with_carry(machine, instruction: Instruction, name: str, carry_in: bool) -> Callable:
    """add.cc, addc, sub.cc, subc: the carry is a predicate register whose name no program can write."""
    unsigned = "u" + name[1:]
    put = target(machine, instruction.operands[0], unsigned)
    first, second = (source(machine, operand, unsigned) for operand in instruction.operands[1:3])
    machine.kernel.registers.setdefault("%carry flag", "pred")
    put_carry, get_carry = target(machine, "%carry flag", "pred"), source(machine, "%carry flag", "pred")
    subtract = instruction.base.startswith("sub")
    sets = "cc" in instruction.modifiers
    one = DTYPES[unsigned].type(1)

    def run(group) -> None:
        a, b = first(group), second(group)
        carry = get_carry(group) if carry_in else None
        if subtract:
            result, out = a - b, np.less(a, b)
            if carry is not None:
                result, out = result - carry * one, out | ((a == b) & carry)
        else:
            result = a + b
            out = np.less(result, b)
            if carry is not None:
                result = result + carry * one
                out = out | (carry & (result == 0))
        put(group, np.asarray(result))
        if sets:
            put_carry(group, np.array(np.broadcast_to(out, (group.count,))))

    return run


@binds("addc", "subc")
def _addc(machine, instruction: Instruction) -> Callable:
    return _with_carry(machine, instruction, typed(instruction, ("cc",)), True)


def _high64(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    mask, half = U64(0xFFFFFFFF), U64(32)
    a0, a1, b0, b1 = a & mask, a >> half, b & mask, b >> half
    low, middle = a0 * b0, a1 * b0
    middle = middle + (low >> half)
    other = a0 * b1 + (middle & mask)
    return a1 * b1 + (middle >> half) + (other >> half)


def multiply(name: str, part: str) -> tuple[Callable, str]:
    """The function of mul.<part>.<name> and the type of its result."""
    dtype = DTYPES[name]
    bits = 8 * dtype.itemsize
    double = f"{name[0]}{2 * bits}"
    if part == "lo":
        return np.multiply, name
    if part == "wide":
        wide = DTYPES[double]
        return lambda a, b: a.astype(wide) * b.astype(wide), double
    if part == "hi" and bits < 64:
        wide = DTYPES[double]
        return lambda a, b: ((a.astype(wide) * b.astype(wide)) >> wide.type(bits)).astype(dtype), name
    if part == "hi" and name == "u64":
        return _high64, name
    if part == "hi":

        def signed_high(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            high = _high64(a.view(U64), b.view(U64)).view(np.int64)
            return high - np.where(a < 0, b, 0) - np.where(b < 0, a, 0)

        return signed_high, name
    raise PtxError(f"unknown modifier .{part}")


def _low24(a: np.ndarray, name: str) -> np.ndarray:
    a = a.astype(np.int64) & 0xFFFFFF
    return a - ((a & 0x800000) << 1) if name == "s32" else a


@binds("mul24", "mad24")
def _mul24(machine, instruction: Instruction) -> Callable:
    name = typed(instruction, ("lo", "hi"))
    shift = 16 if "hi" in instruction.modifiers else 0

    def function(a, b, *c):
        product = (_low24(a, name) * _low24(b, name)) >> shift
        return (product + (c[0].astype(np.int64) if c else 0)).astype(DTYPES[name])

    return elementwise(machine, instruction, [name] * (2 + (instruction.base == "mad24")), name, function)


def mul_mad(machine, instruction: Instruction) -> Callable:
    name = typed(instruction, ("lo", "hi", "wide"))
    part = next((word for word in instruction.modifiers[:-1] if word in ("lo", "hi", "wide")), "lo")
    function, result = multiply(name, part)
    if instruction.base == "mul":
        return elementwise(machine, instruction, [name, name], result, function)
    return elementwise(machine, instruction, [name, name, result], result, lambda a, b, c: function(a, b) + c)


def _truncated(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quotient and remainder, towards zero. A division by zero gives all ones and the dividend."""
    a, b = np.broadcast_arrays(a, b)
    ones = a.dtype.type(-1) if a.dtype.kind == "i" else a.dtype.type(np.iinfo(a.dtype).max)
    zero = b == 0
    safe = np.where(zero, a.dtype.type(1), b)
    quotient = a // safe
    remainder = a - quotient * safe
    if a.dtype.kind == "i":
        off = (remainder != 0) & ((remainder < 0) != (a < 0))
        quotient = quotient + off
        remainder = remainder - off * safe
    return np.where(zero, ones, quotient).astype(a.dtype), np.where(zero, a, remainder).astype(a.dtype)


def divide(machine, instruction: Instruction) -> Callable:
    name = typed(instruction)
    return elementwise(machine, instruction, [name, name], name, lambda a, b: _truncated(a, b)[0])


@binds("rem")
def _rem(machine, instruction: Instruction) -> Callable:
    name = typed(instruction)
    return elementwise(machine, instruction, [name, name], name, lambda a, b: _truncated(a, b)[1])


def minimum_maximum(machine, instruction: Instruction) -> Callable:
    function = np.minimum if instruction.base == "min" else np.maximum
    name = instruction.modifiers[-1]
    if name in ("u16x2", "s16x2"):
        return elementwise(machine, instruction, ["b32"] * 2, "b32", _pairs(function, name[0]))
    name = typed(instruction, ("relu",))
    if "relu" in instruction.modifiers:
        zero = DTYPES[name].type(0)
        return elementwise(machine, instruction, [name, name], name, lambda a, b: np.maximum(function(a, b), zero))
    return elementwise(machine, instruction, [name, name], name, function)


def _pairs(function: Callable, kind: str) -> Callable:
    dtype = "i2" if kind == "s" else "u2"

    def run(a, b):
        a, b = np.broadcast_arrays(a, b)
        return function(np.ascontiguousarray(a).view(dtype), np.ascontiguousarray(b).view(dtype)).view(U32)

    return run


def absolute_negated(machine, instruction: Instruction) -> Callable:
    name = typed(instruction)
    return elementwise(machine, instruction, [name], name, np.absolute if instruction.base == "abs" else np.negative)


@binds("sad")
def _sad(machine, instruction: Instruction) -> Callable:
    name = typed(instruction)
    return elementwise(machine, instruction, [name] * 3, name, lambda a, b, c: c + np.where(a < b, b - a, a - b))


@binds("and", "or", "xor", "not", "cnot")
def _logic(machine, instruction: Instruction) -> Callable:
    name = typed(instruction, (), BITS | {"pred"})
    functions = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}
    functions["cnot"] = lambda a: (a == 0).astype(a.dtype)
    count = 1 if instruction.base in ("not", "cnot") else 2
    return elementwise(machine, instruction, [name] * count, name, functions[instruction.base])


@binds("shl", "shr")
def _shift(machine, instruction: Instruction) -> Callable:
    name = typed(instruction, (), INTEGERS | BITS)
    dtype = DTYPES[name]
    bits = 8 * dtype.itemsize
    operate = np.left_shift if instruction.base == "shl" else np.right_shift
    amount = instruction.operands[2]
    if isinstance(amount, Immediate) and 0 <= amount.value < bits:
        put, get = target(machine, instruction.operands[0], name), source(machine, instruction.operands[1], name)
        constant = dtype.type(amount.value)
        return lambda group: put(group, operate(get(group), constant))

    def function(a, b):
        # Amounts above the width are clamped: numpy's shifts by them are undefined.
        inside = operate(a, np.minimum(b, U32(bits - 1)).astype(dtype))
        beyond = a >> dtype.type(bits - 1) if dtype.kind == "i" and instruction.base == "shr" else dtype.type(0)
        return np.where(b < bits, inside, beyond).astype(dtype)

    return elementwise(machine, instruction, [name, "u32"], name, function)


@binds("shf")
def _funnel_shift(machine, instruction: Instruction) -> Callable:
    direction, mode, name = instruction.modifiers
    if direction not in "lr" or mode not in ("wrap", "clamp") or name != "b32":
        raise PtxError("unknown form")

    def function(a, b, c):
        amount = (c & U32(31) if mode == "wrap" else np.minimum(c, U32(32))).astype(U64)
        both = (b.astype(U64) << U64(32)) | a
        if direction == "r":
            # A shift by 32 leaves b; by less, the low word of both shifted.
            return (both >> amount).astype(U32)
        return ((both << amount) >> U64(32)).astype(U32) if mode == "wrap" else _clamped_left(both, amount)

    return elementwise(machine, instruction, ["b32", "b32", "u32"], "b32", function)


def _clamped_left(both: np.ndarray, amount: np.ndarray) -> np.ndarray:
    return np.where(amount == 32, both & U64(0xFFFFFFFF), (both << amount) >> U64(32)).astype(U32)
