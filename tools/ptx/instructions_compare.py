"""Comparisons and selections."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .module import Instruction, PtxError
from .operands import DTYPES, binds, elementwise, require, source, target
from .rounding import bfloat_value, flush

_ORDERED = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
_COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _float_comparison(name: str) -> Callable:
    """numpy's comparisons with NaN are false, except !=. The .<op>u forms are true."""
    if name == "num":
        return lambda a, b: ~(np.isnan(a) | np.isnan(b))
    if name == "nan":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    if name == "ne":
        return lambda a, b: (a < b) | (a > b)
    if name.endswith("u") and name[:-1] in _ORDERED:
        ordered = _float_comparison(name[:-1])
        return lambda a, b: ordered(a, b) | np.isnan(a) | np.isnan(b)
    return _ORDERED[name]


def comparison(name: str, type_name: str, words: tuple[str, ...]) -> Callable:
    """A function of two operands in the dtype of the type."""
    if type_name in ("f32", "f64", "f16"):
        compare = _float_comparison(name)
        return (lambda a, b: compare(flush(a), flush(b))) if "ftz" in words and type_name == "f32" else compare
    if type_name == "bf16":
        compare = _float_comparison(name)
        return lambda a, b: compare(bfloat_value(a), bfloat_value(b))
    if name not in _ORDERED or type_name not in DTYPES:
        raise PtxError(f"unknown comparison .{name}.{type_name}")
    return _ORDERED[name]


@binds("setp")
def _setp(machine, instruction: Instruction) -> Callable:
    name, *words, type_name = instruction.modifiers
    require(instruction, (*_COMBINE, "ftz"), words)
    results, first, second, *combined = instruction.operands
    if not isinstance(results, tuple):
        results = (results, "_")
    pairs = type_name in ("f16x2", "bf16x2")
    kind = "b32" if pairs else type_name
    puts = [target(machine, operand, "pred") for operand in results]
    gets = [source(machine, operand, kind) for operand in (first, second)]
    third = source(machine, combined[0], "pred") if combined else None
    combine = next((_COMBINE[word] for word in words if word in _COMBINE), None)
    compare = comparison(name, type_name.removesuffix("x2"), tuple(words))

    def run(group) -> None:
        a, b = gets[0](group), gets[1](group)
        if pairs:
            # The first predicate belongs to the low halves, the second to the high halves.
            dtype = DTYPES[type_name.removesuffix("x2")]
            a, b = (np.ascontiguousarray(np.broadcast_to(x, (group.count,))).view(dtype) for x in (a, b))
            both = compare(a, b)
            found, other = both[::2].copy(), both[1::2].copy()
        else:
            found = np.asarray(compare(a, b))
            other = ~found if results[1] != "_" else None
        if combine:
            c = third(group)
            found = combine(found, c)
            other = combine(other, c) if other is not None else None
        puts[0](group, np.asarray(found))
        if other is not None:
            puts[1](group, np.asarray(other))

    return run


@binds("set")
def _set(machine, instruction: Instruction) -> Callable:
    name, *words, result, type_name = instruction.modifiers
    require(instruction, (*_COMBINE, "ftz"), words)
    compare = comparison(name, type_name, tuple(words))
    combine = next((_COMBINE[word] for word in words if word in _COMBINE), None)
    values = {"f32": np.float32(1), "u32": np.uint32(0xFFFFFFFF), "s32": np.int32(-1), "f16": np.float16(1)}
    if result not in values:
        raise PtxError(f"unknown type .{result}")
    true = values[result]

    def function(a, b, *c):
        found = compare(a, b)
        return np.where(combine(found, c[0]) if combine else found, true, true.dtype.type(0))

    types = [type_name, type_name] + ["pred"] * bool(combine)
    return elementwise(machine, instruction, types, result, function)


@binds("selp")
def _selp(machine, instruction: Instruction) -> Callable:
    (name,) = instruction.modifiers
    kind = f"b{8 * DTYPES[name].itemsize}"
    return elementwise(machine, instruction, [kind, kind, "pred"], kind, lambda a, b, c: np.where(c, a, b))


@binds("slct")
def _slct(machine, instruction: Instruction) -> Callable:
    *words, name, sign = instruction.modifiers
    require(instruction, ("ftz",), words)
    kind = f"b{8 * DTYPES[name].itemsize}"
    return elementwise(machine, instruction, [kind, kind, sign], kind, lambda a, b, c: np.where(c >= 0, a, b))
