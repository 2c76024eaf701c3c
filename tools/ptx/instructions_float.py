"""Arithmetic of float32, float64, float16, bfloat16 and pairs; and the opcodes that integers share with them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import instructions_integer as integer
from .module import Instruction, PtxError
from .operands import binds, elementwise, require
from .rounding import bfloat_bits, bfloat_value, flush, fma32, fma64, odd_sum, to_float32

FLOATS = {"f32", "f64", "f16", "bf16", "f16x2", "bf16x2"}
ROUNDINGS = ("rn", "rz", "rm", "rp")
F32 = np.float32


def _canonical(values: np.ndarray) -> np.ndarray:
    """The NaN that PTX produces."""
    if values.dtype == np.float32:
        return np.where(np.isnan(values), np.uint32(0x7FFFFFFF).view(F32), values)
    if values.dtype == np.float16:
        return np.where(np.isnan(values), np.uint16(0x7FFF).view(np.float16), values)
    return values


def sixteen(machine, instruction: Instruction, function: Callable, count: int) -> Callable:
    """A float16 or bfloat16 instruction, alone or in pairs. The function takes float32 operands; its values are rounded
    once to the result."""
    name = instruction.modifiers[-1]
    brain = name.startswith("bf16")

    def run(*operands):
        arrays = [np.ascontiguousarray(array) for array in np.broadcast_arrays(*operands)]
        raw = [np.atleast_1d(array).view(np.uint16) for array in arrays]
        values = [bfloat_value(a) if brain else a.view(np.float16).astype(F32) for a in raw]
        result = np.asarray(function(*values))
        if brain:
            bits = bfloat_bits(result)
        else:
            bits = _canonical(result.astype(np.float16)).view(np.uint16)
        return bits.view(np.uint32) if name.endswith("x2") else bits

    raw_type = "b32" if name.endswith("x2") else "b16"
    return elementwise(machine, instruction, [raw_type] * count, raw_type, run)


def _modified(function: Callable, words: tuple[str, ...]) -> Callable:
    """Applies .ftz to operands and result, and .sat."""
    if "ftz" in words:
        inner = function

        def function(*operands):
            return flush(inner(*[flush(operand) for operand in operands]))

    if "sat" in words:
        unsaturated = function

        def function(*operands):
            values = unsaturated(*operands)
            return np.where(np.isnan(values), values.dtype.type(0), np.clip(values, 0, 1))

    return function


def _arithmetic(machine, instruction: Instruction, plain: Callable, exact: Callable, count: int) -> Callable:
    """plain: to nearest in the operands' dtype; exact: float64, exact or rounded to odd, of float32 operands."""
    *words, name = instruction.modifiers
    require(instruction, (*ROUNDINGS, "ftz", "sat", "relu"), words)
    if name not in FLOATS:
        raise PtxError(f"unknown type .{name}")
    mode = next((word for word in words if word in ROUNDINGS), "rn")
    if name in ("f16", "f16x2", "bf16", "bf16x2"):
        if mode != "rn":
            raise PtxError(f"unknown modifier .{mode}")

        def wide(*operands):
            result = exact(*[operand.astype(np.float64) for operand in operands])
            if "sat" in words:
                result = np.where(np.isnan(result), 0.0, np.clip(result, 0, 1))
            if "relu" in words:
                result = np.where(np.isnan(result), result, np.maximum(result, 0.0))
            return result

        return sixteen(machine, instruction, wide, count)
    if "relu" in words or (name == "f64" and mode != "rn"):
        raise PtxError("unknown form")
    if mode != "rn":

        def function(*operands):
            return to_float32(exact(*[operand.astype(np.float64) for operand in operands]), mode)

    else:
        function = plain
    return elementwise(machine, instruction, [name] * count, name, _modified(function, tuple(words)))


@binds("add", "sub")
def _add(machine, instruction: Instruction) -> Callable:
    if integer.is_integer(instruction):
        return integer.add_subtract(machine, instruction)
    if instruction.base == "add":
        return _arithmetic(machine, instruction, np.add, odd_sum, 2)
    return _arithmetic(machine, instruction, np.subtract, lambda a, b: odd_sum(a, -b), 2)


@binds("mul")
def _mul(machine, instruction: Instruction) -> Callable:
    if integer.is_integer(instruction):
        return integer.mul_mad(machine, instruction)
    return _arithmetic(machine, instruction, np.multiply, np.multiply, 2)


@binds("fma", "mad")
def _fma(machine, instruction: Instruction) -> Callable:
    if integer.is_integer(instruction):
        return integer.mul_mad(machine, instruction)
    plain = fma64 if instruction.modifiers[-1] == "f64" else lambda a, b, c: fma32(*np.broadcast_arrays(a, b, c))
    return _arithmetic(machine, instruction, plain, lambda a, b, c: odd_sum(a * b, c), 3)


@binds("div")
def _div(machine, instruction: Instruction) -> Callable:
    if integer.is_integer(instruction):
        return integer.divide(machine, instruction)
    *words, name = instruction.modifiers
    # .approx and .full may be off by two units in the last place: the nearest is one of those.
    require(instruction, ("rn", "approx", "full", "ftz"), words)
    if name not in ("f32", "f64"):
        raise PtxError(f"unknown type .{name}")
    return elementwise(machine, instruction, [name, name], name, _modified(np.divide, tuple(words)))


_UNARY = {
    "rcp": lambda a: 1 / a,
    "sqrt": np.sqrt,
    "rsqrt": lambda a: 1 / np.sqrt(a),
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


@binds(*_UNARY)
def _unary(machine, instruction: Instruction) -> Callable:
    *words, name = instruction.modifiers
    require(instruction, ("rn", "approx", "ftz"), words)
    function = _UNARY[instruction.base]
    if name in ("f16", "bf16", "f16x2", "bf16x2"):
        return sixteen(machine, instruction, lambda a: function(a.astype(np.float64)), 1)
    if name == "f64":
        return elementwise(machine, instruction, ["f64"], "f64", function)
    if name != "f32":
        raise PtxError(f"unknown type .{name}")
    if instruction.base in ("rcp", "sqrt"):
        # numpy gives the nearest float32, which .approx may give too.
        plain = (lambda a: F32(1) / a) if instruction.base == "rcp" else np.sqrt
        return elementwise(machine, instruction, ["f32"], "f32", _modified(plain, tuple(words)))
    return elementwise(
        machine,
        instruction,
        ["f32"],
        "f32",
        _modified(lambda a: function(a.astype(np.float64)).astype(F32), tuple(words)),
    )


@binds("abs", "neg")
def _abs(machine, instruction: Instruction) -> Callable:
    if integer.is_integer(instruction):
        return integer.absolute_negated(machine, instruction)
    *words, name = instruction.modifiers
    require(instruction, ("ftz",), words)
    # On the bits: NaN too.
    size = {"f16": "b16", "bf16": "b16", "f32": "b32", "f64": "b64", "f16x2": "b32", "bf16x2": "b32"}[name]
    sign = {"b16": 0x8000, "b32": 0x80000000, "b64": 1 << 63}[size]
    if name.endswith("x2"):
        sign = 0x80008000
    constant = np.dtype(f"u{int(size[1:]) // 8}").type(sign)
    clear, flip = (lambda a: a & ~constant), (lambda a: a ^ constant)
    function = clear if instruction.base == "abs" else flip
    if "ftz" in words and name == "f32":
        return elementwise(machine, instruction, ["b32"], "b32", lambda a: flush(function(a).view(F32)).view(np.uint32))
    return elementwise(machine, instruction, [size], size, function)


@binds("copysign")
def _copysign(machine, instruction: Instruction) -> Callable:
    name = instruction.modifiers[-1]
    return elementwise(machine, instruction, [name, name], name, lambda a, b: np.copysign(b, a))


def _signed_order(function: Callable, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Minimum or maximum by np.fmin or np.fmax, which leave -0 and +0 unordered: PTX has -0 < +0."""
    result = function(a, b)
    equal = (a == b) & (a == 0)
    if np.any(equal):
        negative = np.signbit(a) | np.signbit(b) if function in (np.fmin, np.minimum) else np.signbit(a) & np.signbit(b)
        zero = np.where(negative, -result.dtype.type(0), result.dtype.type(0))
        result = np.where(equal, zero, result)
    return result


@binds("min", "max")
def _min(machine, instruction: Instruction) -> Callable:
    *words, name = instruction.modifiers
    if name not in FLOATS:
        return integer.minimum_maximum(machine, instruction)
    require(instruction, ("ftz", "NaN", "xorsign", "abs"), words)
    if "xorsign" in words or "abs" in words:
        raise PtxError("unknown form")
    functions = (np.minimum, np.maximum) if "NaN" in words else (np.fmin, np.fmax)
    function = functions[instruction.base == "max"]
    count = len(instruction.operands) - 1

    def run(*operands):
        result = operands[0]
        for operand in operands[1:]:
            result = _signed_order(function, result, operand)
        return result

    if name in ("f32", "f64"):
        finish = _modified(run, tuple(words))
        return elementwise(machine, instruction, [name] * count, name, lambda *a: _canonical(finish(*a)))
    return sixteen(machine, instruction, run, count)


@binds("testp")
def _testp(machine, instruction: Instruction) -> Callable:
    what, name = instruction.modifiers
    tiny = np.finfo({"f32": np.float32, "f64": np.float64}[name]).tiny
    tests = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda a: ~np.isnan(a),
        "notanumber": np.isnan,
        "normal": lambda a: np.isfinite(a) & (np.abs(a) >= tiny),
        "subnormal": lambda a: (a != 0) & (np.abs(a) < tiny),
    }
    return elementwise(machine, instruction, [name], "pred", tests[what])
