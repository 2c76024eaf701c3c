"""Moves and conversions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .memory import LOCAL_WINDOW, SHARED_WINDOW
from .module import Instruction, PtxError
from .operands import DTYPES, binds, elementwise, require, source, target
from .rounding import bfloat_bits, bfloat_value, flush, to_float32, toward

_INTEGER_ROUNDING = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
_FLOAT_ROUNDING = ("rn", "rz", "rm", "rp", "rna")


@binds("mov")
def _mov(machine, instruction: Instruction) -> Callable:
    (name,) = instruction.modifiers
    result, operand = instruction.operands
    if isinstance(operand, tuple) and operand[0] != "!":
        size = DTYPES[name].itemsize // len(operand)
        put, gets = target(machine, result, name), [source(machine, part, f"b{8 * size}") for part in operand]

        def pack(group) -> None:
            rows = np.empty((group.count, len(gets)), f"u{size}")
            for column, get in enumerate(gets):
                rows[:, column] = get(group)
            put(group, rows.view(f"u{size * len(gets)}").reshape(-1))

        return pack
    if isinstance(result, tuple):
        size = DTYPES[name].itemsize // len(result)
        get, puts = source(machine, operand, name), [target(machine, part, f"b{8 * size}") for part in result]

        def unpack(group) -> None:
            values = np.ascontiguousarray(np.broadcast_to(get(group), (group.count,)))
            rows = values.view(f"u{size}").reshape(group.count, -1)
            for column, put in enumerate(puts):
                put(group, rows[:, column].copy())

        return unpack
    get, put = source(machine, operand, name), target(machine, result, name)
    return lambda group: put(group, np.array(get(group)))


@binds("cvta")
def _cvta(machine, instruction: Instruction) -> Callable:
    *words, name = instruction.modifiers
    back = words[0] == "to"
    space = words[-1].split(":")[0]
    window = {"global": 0, "const": 0, "shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "param": 0}[space]
    if back:
        window = -window
    shift = DTYPES[name].type(window & (2 ** (8 * DTYPES[name].itemsize) - 1))
    return elementwise(machine, instruction, [name], name, lambda a: a + shift)


@binds("isspacep")
def _isspacep(machine, instruction: Instruction) -> Callable:
    low = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "global": 0}[instruction.modifiers[0].split(":")[0]]
    high = {"shared": 1 << 62, "local": SHARED_WINDOW, "global": LOCAL_WINDOW}[instruction.modifiers[0].split(":")[0]]
    return elementwise(machine, instruction, ["u64"], "pred", lambda a: (a >= np.uint64(low)) & (a < np.uint64(high)))


def _as_float(values: np.ndarray, name: str) -> np.ndarray:
    return bfloat_value(values) if name == "bf16" else np.asarray(values)


def _to_integer(values: np.ndarray, name: str, source_name: str, rounding: str) -> np.ndarray:
    """Floats to integers: out of range clamps. NaN becomes 0, or the top bit if either side has 64 bits."""
    info = np.iinfo(DTYPES[name])
    nan = np.isnan(values)
    rounded = _INTEGER_ROUNDING[rounding](values.astype(np.float64))
    too_large, too_small = rounded >= float(info.max) + (info.max < 2**53), rounded <= float(info.min)
    inside = np.where(nan | too_large | too_small, 0.0, rounded)
    result = inside.astype(np.int64 if info.min < 0 or info.bits < 64 else np.uint64).astype(DTYPES[name])
    result = np.where(too_large, DTYPES[name].type(info.max), np.where(too_small, DTYPES[name].type(info.min), result))
    if info.bits == 64 or source_name == "f64":
        invalid = np.array(1 << (info.bits - 1), f"u{info.bits // 8}").view(DTYPES[name])
    else:
        invalid = DTYPES[name].type(0)
    return np.where(nan, invalid, result)


def _to_float(values: np.ndarray, name: str, mode: str) -> np.ndarray:
    """Integers or floats to floats, with one rounding."""
    values = np.asarray(values)
    if name == "bf16":
        if values.dtype.kind in "iu":
            if values.dtype.itemsize == 8:
                raise PtxError("unknown form")
            values = values.astype(np.float64)
        return bfloat_bits(values, mode)
    dtype = DTYPES[name]
    if mode == "rn" or dtype == np.float64:
        if values.dtype.kind in "iu" and dtype == np.float16:
            values = values.astype(np.float64)
        with np.errstate(all="ignore"):
            result = values.astype(dtype)
        nan = {"f16": (np.uint16, 0x7FFF), "f32": (np.uint32, 0x7FFFFFFF)}.get(name)
        if nan and values.dtype.kind == "f" and values.dtype != dtype and np.isnan(result).any():
            result = np.where(np.isnan(result), nan[0](nan[1]).view(dtype), result)
        return result
    if values.dtype.kind in "iu" and values.dtype.itemsize == 8:
        # float64 holds 53 bits: rounded to odd first.
        exact = values.astype(np.float64)
        raise_bits = exact.astype(values.dtype) != values
        if raise_bits.any():
            raise PtxError("unknown form: directed rounding of a 64-bit integer")
        values = exact
    wide = values.astype(np.float64)
    if mode == "rna":
        raise PtxError("unknown modifier .rna")
    return to_float32(wide, mode) if name == "f32" else toward(wide, wide.astype(dtype), mode)


def conversion(result: str, name: str, words: tuple[str, ...]) -> Callable:
    """The function of cvt.<words>.<result>.<name>."""
    floats = ("f16", "bf16", "f32", "f64")
    whole = next((word for word in words if word in _INTEGER_ROUNDING), None)
    mode = next((word for word in words if word in _FLOAT_ROUNDING), "rn")
    saturate, ftz, relu = "sat" in words, "ftz" in words, "relu" in words

    def from_float(values):
        values = _as_float(values, name)
        if ftz and name == "f32":
            values = flush(values)
        if result not in floats:
            return _to_integer(values, result, name, whole or "rzi")
        if whole:
            values = _INTEGER_ROUNDING[whole](values)
        if saturate:
            values = np.where(np.isnan(values), values.dtype.type(0), np.clip(values, 0, 1))
        if relu:
            values = np.where(np.isnan(values), values, np.maximum(values, 0))
        if result == name:
            return np.array(values) if name != "bf16" else bfloat_bits(values)
        rounded = _to_float(values, result, mode)
        return flush(rounded) if ftz and result == "f32" else rounded

    def from_integer(values):
        values = np.asarray(values)
        if result in floats:
            return _to_float(values, result, mode)
        if saturate:
            info = np.iinfo(DTYPES[result])
            low = max(int(np.iinfo(values.dtype).min), int(info.min))
            high = min(int(np.iinfo(values.dtype).max), int(info.max))
            values = np.clip(values, values.dtype.type(low), values.dtype.type(high))
        return np.array(values.astype(DTYPES[result]))

    return from_float if name in floats else from_integer


@binds("cvt")
def _cvt(machine, instruction: Instruction) -> Callable:
    words = instruction.modifiers
    if words[0] == "pack":
        return _cvt_pack(machine, instruction)
    *words, result, name = words
    require(instruction, (*_FLOAT_ROUNDING, *_INTEGER_ROUNDING, "sat", "ftz", "relu"), words)
    if result in ("f16x2", "bf16x2") and name == "f32":
        half = conversion(result[:-2], "f32", tuple(words))

        def pair(a, b):
            a, b = np.broadcast_arrays(a, b)
            high, low = (half(x).view(np.uint16).astype(np.uint32) for x in (a, b))
            return (high << np.uint32(16)) | low

        return elementwise(machine, instruction, ["f32", "f32"], "b32", pair)
    if result not in DTYPES or name not in DTYPES or "x2" in result + name:
        raise PtxError("unknown form")
    return elementwise(machine, instruction, [name], result, conversion(result, name, tuple(words)))


def _cvt_pack(machine, instruction: Instruction) -> Callable:
    """cvt.pack.sat.<type>.s32{.b32} d, a, b{, c}: a and b saturated, a above b, and c shifted up to be above both."""
    _, saturate, narrow, wide, *rest = instruction.modifiers
    if saturate != "sat" or wide != "s32" or rest not in ([], ["b32"]):
        raise PtxError("unknown form")
    bits = int(narrow[1:])
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if narrow[0] == "s" else (0, (1 << bits) - 1)
    mask = np.uint32((1 << bits) - 1)

    def function(a, b, *c):
        upper, lower = (np.asarray(np.clip(x, np.int32(low), np.int32(high))).view(np.uint32) & mask for x in (a, b))
        packed = (upper << np.uint32(bits)) | lower
        return packed | (c[0] << np.uint32(2 * bits)) if c else packed

    types = ["s32", "s32", *rest]
    if len(instruction.operands) != len(types) + 1:
        raise PtxError("unknown form")
    return elementwise(machine, instruction, types, "b32", function)
