"""The operands of instructions, and the registration of instructions.

Registers are unsigned arrays of their width, one element per lane, predicates bool. :func:`source` makes a function
that gives an operand's values for a group of lanes in the dtype of an instruction's type, :func:`target` one that takes
them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .groups import Group
from .memory import LOCAL_WINDOW, SHARED_WINDOW
from .module import Address, Immediate, Instruction, PtxError, Symbol

__all__ = ["BINDERS", "DTYPES", "address", "binds", "elementwise", "require", "source", "target"]

# base opcode -> function(machine, instruction) that gives function(group)
BINDERS: dict[str, Callable] = {}

# bfloat16 has no numpy type, and the instructions split pairs of halves: both are passed as bits.
DTYPES = {f"{kind}{bits}": np.dtype(f"u{bits // 8}") for kind in "bu" for bits in (8, 16, 32, 64)}
DTYPES |= {f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)}
DTYPES |= {"f16": np.dtype("f2"), "f32": np.dtype("f4"), "f64": np.dtype("f8"), "pred": np.dtype(bool)}
DTYPES |= {"bf16": np.dtype("u2"), "f16x2": np.dtype("u4"), "bf16x2": np.dtype("u4")}


def binds(*bases: str) -> Callable:
    """Marks the binder of these opcodes."""

    def register(function: Callable) -> Callable:
        for base in bases:
            BINDERS[base] = function
        return function

    return register


def require(instruction: Instruction, allowed: set[str] | tuple[str, ...], words: tuple[str, ...] | list[str]) -> None:
    """Modifiers that the executor gives no meaning to make an instruction unknown."""
    for word in words:
        if word not in allowed:
            raise PtxError(f"unknown modifier .{word.replace(':', '::')}")


def _immediate(operand: Immediate, type_name: str) -> np.generic:
    dtype = DTYPES[type_name]
    if dtype.kind == "b":
        return np.bool_(operand.value != 0)
    bits, size = operand.value, dtype.itemsize
    if operand.float_bytes and operand.float_bytes != size and dtype.kind == "f":
        value = np.uint64(bits).view("f8") if operand.float_bytes == 8 else np.uint32(bits).view("f4")
        return dtype.type(value)
    return np.array(bits & (2 ** (8 * size) - 1), f"u{size}").view(dtype)[()]


def source(machine, operand, type_name: str) -> Callable[[Group], np.ndarray]:
    """A function group -> values in the dtype of the type. An immediate may give a scalar."""
    dtype = DTYPES[type_name]
    if isinstance(operand, tuple) and operand and operand[0] == "!":
        inner = source(machine, operand[1], "pred")
        return lambda group: ~inner(group)
    if isinstance(operand, Immediate):
        value = _immediate(operand, type_name)
        return lambda group: value
    if isinstance(operand, Symbol):
        constant = np.array(machine.layout.address(operand.name) + operand.offset, f"u{dtype.itemsize}").view(dtype)[()]
        return lambda group: constant
    if not isinstance(operand, str):
        raise PtxError(f"an operand of type .{type_name} cannot be {operand}")
    if operand == "WARP_SZ":
        return lambda group: dtype.type(32)
    slot = machine.slot(operand)
    size = machine.slot_bytes[slot]
    registers, value_of = machine.registers, machine.value
    if size == dtype.itemsize:

        def get(group: Group) -> np.ndarray:
            values = registers[slot]
            if values is None:
                values = value_of(slot)
            if group.select is not None:
                values = values[group.select]
            return values.view(dtype)

        return get
    if size < dtype.itemsize or dtype.kind == "b":
        raise PtxError(f"register {operand} is too narrow for .{type_name}")
    narrow = np.dtype(f"u{dtype.itemsize}")

    def get_low(group: Group) -> np.ndarray:
        values = value_of(slot)
        if group.select is not None:
            values = values[group.select]
        return values.astype(narrow).view(dtype)

    return get_low


def target(machine, operand, type_name: str) -> Callable[[Group, np.ndarray], None]:
    """A function (group, values) that writes a register. It keeps `values`, and nothing else may keep them."""
    dtype = DTYPES[type_name]
    if operand == "_":
        return lambda group, values: None
    if not isinstance(operand, str) or (operand.startswith("%") and operand not in machine.kernel.registers):
        raise PtxError(f"a result of type .{type_name} cannot go to {operand}")
    slot = machine.slot(operand)
    size = machine.slot_bytes[slot]
    if size < dtype.itemsize or (dtype.kind == "b" and size > 1):
        raise PtxError(f"register {operand} is too narrow for .{type_name}")
    registers, value_of = machine.registers, machine.value
    plain = np.dtype(bool) if dtype.kind == "b" else np.dtype(f"u{size}")
    wide = np.dtype(f"{'i' if dtype.kind == 'i' else 'u'}{size}")
    raw = np.dtype(f"u{dtype.itemsize}")
    extend = size != dtype.itemsize

    def put(group: Group, values: np.ndarray) -> None:
        if values.dtype != dtype:
            values = values.astype(dtype)
        if extend:
            values = values.astype(wide) if dtype.kind == "i" else values.view(raw).astype(wide)
        if values.ndim == 0:
            values = np.full(group.count, values)
        values = values.view(plain)
        if group.select is None:
            registers[slot] = values
        else:
            value_of(slot)[group.select] = values

    return put


def address(machine, operand, space: str) -> Callable[[Group], np.ndarray]:
    """A function group -> uint64 addresses of an Address operand, of the space they are meant for."""
    if not isinstance(operand, Address):
        raise PtxError(f"an address cannot be {operand}")
    offset = np.uint64(operand.offset & (2**64 - 1))
    if operand.base is None or isinstance(operand.base, Symbol):
        place = 0
        if isinstance(operand.base, Symbol):
            place = machine.layout.address(operand.base.name) + operand.base.offset
            if space == "generic":
                place += {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW}.get(
                    machine.layout.spaces[operand.base.name], 0
                )
        constant = np.uint64((place + operand.offset) & (2**64 - 1))
        return lambda group: np.full(group.count, constant)
    size = machine.slot_bytes[machine.slot(operand.base)]
    get = source(machine, operand.base, f"u{8 * size}")
    if size == 4:
        if space not in ("shared", "local"):
            raise PtxError(f"a {space} address cannot be in the 32-bit register {operand.base}")
        shift = np.int64(operand.offset)
        return lambda group: ((get(group) + shift) & np.int64(0xFFFFFFFF)).view(np.uint64)
    if operand.offset == 0:
        return get
    return lambda group: get(group) + offset


def elementwise(machine, instruction: Instruction, types: list[str], result: str, function: Callable) -> Callable:
    """Operand 0 = function(operands 1, 2, ...), element by element, the operands of these types."""
    if len(instruction.operands) != len(types) + 1:
        raise PtxError(f"takes {len(types) + 1} operands")
    put = target(machine, instruction.operands[0], result)
    gets = [source(machine, operand, name) for operand, name in zip(instruction.operands[1:], types, strict=True)]
    if len(gets) == 1:
        (first,) = gets
        return lambda group: put(group, function(first(group)))
    if len(gets) == 2:
        first, second = gets
        return lambda group: put(group, function(first(group), second(group)))
    return lambda group: put(group, function(*[get(group) for get in gets]))
