"""Bits and bytes of integers: truth tables, permutation, fields, counts; dot products of bytes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .instructions_integer import typed
from .module import Instruction, PtxError
from .operands import DTYPES, binds, elementwise, source, target

U64, U32 = np.uint64, np.uint32


def _of_two(table: int, b: np.ndarray, c: np.ndarray):
    """The function of b and c with the 4-bit truth table; an int stands for a constant."""
    both = {
        0b0000: lambda: 0,
        0b1111: lambda: -1,
        0b1100: lambda: b,
        0b0011: lambda: ~b,
        0b1010: lambda: c,
        0b0101: lambda: ~c,
        0b1000: lambda: b & c,
        0b0111: lambda: ~(b & c),
        0b1110: lambda: b | c,
        0b0001: lambda: ~(b | c),
        0b0110: lambda: b ^ c,
        0b1001: lambda: ~(b ^ c),
        0b0100: lambda: b & ~c,
        0b1011: lambda: ~b | c,
        0b0010: lambda: ~b & c,
        0b1101: lambda: b | ~c,
    }
    return both[table]()


def lop3(table: int) -> Callable:
    """The function of three words with the 8-bit truth table: bit 4 a + 2 b + c of the table is the result."""
    low, high = table & 15, table >> 4

    def function(a, b, c):
        zeros, ones = _of_two(low, b, c), _of_two(high, b, c)
        if low == high:
            return zeros if not isinstance(zeros, int) else np.broadcast_to(U32(zeros & 0xFFFFFFFF), np.shape(a)).copy()
        if isinstance(zeros, int):
            zeros = U32(zeros & 0xFFFFFFFF)
        if isinstance(ones, int):
            ones = U32(ones & 0xFFFFFFFF)
        if low == 15 - high:
            return zeros ^ a
        if low == 0:
            return a & ones
        if high == 15:
            return a | zeros
        if low == 15:
            return ~a | ones
        if high == 0:
            return ~a & zeros
        return (a & ones) | (~a & zeros)

    return lambda a, b, c: np.array(function(a, b, c))


@binds("lop3")
def _lop3(machine, instruction: Instruction) -> Callable:
    if instruction.modifiers != ("b32",):
        raise PtxError("unknown form")
    table = instruction.operands[4].value
    put = target(machine, instruction.operands[0], "b32")
    first, second, third = (source(machine, operand, "b32") for operand in instruction.operands[1:4])
    function = lop3(table)
    return lambda group: put(group, function(first(group), second(group), third(group)))


_MODES = {
    "f4e": lambda i: (i, i + 1, i + 2, i + 3),
    "b4e": lambda i: (i, i - 1 & 7, i - 2 & 7, i - 3 & 7),
    "rc8": lambda i: (i, i, i, i),
    "ecl": lambda i: (i, max(i, 1), max(i, 2), 3),
    "ecr": lambda i: (0, min(1, i), min(2, i), i),
    "rc16": lambda i: (2 * (i & 1), 2 * (i & 1) + 1) * 2,
}


def prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """prmt.b32: byte i of the result is byte s of {b, a}, or its sign, with s and the choice in nibble i."""
    bytes_of = (b.astype(U64) << U64(32)) | a
    result = U32(0)
    signs = bool(np.any(selector & U32(0x8888)))
    for i in range(4):
        nibble = selector >> U32(4 * i)
        byte = (bytes_of >> ((nibble & U32(7)) << U32(3))).astype(U32) & U32(0xFF)
        if signs:
            sign = (byte >> U32(7)) * U32(0xFF)
            byte = np.where(nibble & U32(8), sign, byte)
        result = result | (byte << U32(8 * i))
    return result


@binds("prmt")
def _prmt(machine, instruction: Instruction) -> Callable:
    name, *mode = instruction.modifiers
    if name != "b32" or len(mode) > 1 or (mode and mode[0] not in _MODES):
        raise PtxError("unknown form")
    if not mode:
        return elementwise(machine, instruction, ["b32"] * 3, "b32", prmt)
    mask = 7 if mode[0] in ("f4e", "b4e") else 3
    # The modes take their selector from the low bits of c: a small table of the general form's.
    table = np.array(
        [sum((byte & 7) << 4 * place for place, byte in enumerate(_MODES[mode[0]](i))) for i in range(mask + 1)], U32
    )
    return elementwise(machine, instruction, ["b32"] * 3, "b32", lambda a, b, c: prmt(a, b, table[c & U32(mask)]))


@binds("bfe")
def _bfe(machine, instruction: Instruction) -> Callable:
    name = typed(instruction, (), {"u32", "s32", "u64", "s64"})
    bits = 8 * DTYPES[name].itemsize
    unsigned = DTYPES["u" + name[1:]]

    def function(a, start, length):
        start, length = (np.asarray(x & U32(0xFF)).astype(np.int64) for x in (start, length))
        raw = a.view(unsigned) if isinstance(a, np.ndarray) else np.asarray(a).view(unsigned)
        shifted = np.where(start < bits, raw >> np.minimum(start, bits - 1).astype(unsigned), unsigned.type(0))
        full = unsigned.type(2**bits - 1)
        keep = np.where(
            length >= bits, full, (unsigned.type(1) << np.minimum(length, bits - 1).astype(unsigned)) - unsigned.type(1)
        )
        result = shifted & keep
        if name[0] == "s":
            top = np.minimum(start + length - 1, bits - 1)
            sign = (raw >> np.maximum(top, 0).astype(unsigned)) & unsigned.type(1)
            # Bits beyond the most significant one of a are copies of the field's sign bit.
            inside = np.clip(np.minimum(length, bits - start), 0, bits)
            below = np.where(
                inside >= bits,
                full,
                (unsigned.type(1) << np.minimum(inside, bits - 1).astype(unsigned)) - unsigned.type(1),
            )
            result = np.where((length > 0) & (sign == 1), (shifted & below) | ~below, result)
        return result.astype(unsigned).view(DTYPES[name])

    return elementwise(machine, instruction, [name, "u32", "u32"], name, function)


@binds("bfi")
def _bfi(machine, instruction: Instruction) -> Callable:
    name = typed(instruction, (), {"b32", "b64"})
    dtype = DTYPES[name]
    bits = 8 * dtype.itemsize

    def function(field, base, start, length):
        start, length = (np.asarray(x & U32(0xFF)).astype(np.int64) for x in (start, length))
        small = np.minimum(length, bits - 1).astype(dtype)
        mask = np.where(length >= bits, dtype.type(2**bits - 1), (dtype.type(1) << small) - dtype.type(1))
        place = np.minimum(start, bits - 1).astype(dtype)
        mask = np.where(start < bits, mask << place, dtype.type(0))
        return ((base & ~mask) | ((field << place) & mask)).astype(dtype)

    return elementwise(machine, instruction, [name, name, "u32", "u32"], name, function)


def _leading_zeros(a: np.ndarray) -> np.ndarray:
    bits = 8 * a.dtype.itemsize
    # frexp of a float64 is exact for 32 bits; 64 bits go in two halves.
    if bits == 64:
        high, low = (a >> U64(32)).astype(U32), a.astype(U32)
        return np.where(high != 0, _leading_zeros(high), U32(32) + _leading_zeros(low)).astype(U32)
    return (bits - np.frexp(a.astype(np.float64))[1]).astype(U32)


@binds("clz", "popc", "brev")
def _counts(machine, instruction: Instruction) -> Callable:
    name = typed(instruction, (), {"b32", "b64"})
    if instruction.base == "clz":
        return elementwise(machine, instruction, [name], "u32", lambda a: _leading_zeros(np.asarray(a)))
    if instruction.base == "popc":
        return elementwise(machine, instruction, [name], "u32", lambda a: np.bitwise_count(a).astype(U32))
    dtype = DTYPES[name]

    def reverse(a):
        raw = np.ascontiguousarray(np.atleast_1d(a)).view(np.uint8).reshape(-1, dtype.itemsize)[:, ::-1]
        bits = np.unpackbits(np.ascontiguousarray(raw), axis=1, bitorder="little").reshape(raw.shape[0], -1, 8)
        return (
            np.packbits(bits[:, :, ::-1].reshape(raw.shape[0], -1), axis=1, bitorder="little").view(dtype).reshape(-1)
        )

    return elementwise(machine, instruction, [name], name, reverse)


@binds("bfind")
def _bfind(machine, instruction: Instruction) -> Callable:
    name = typed(instruction, ("shiftamt",), {"u32", "s32", "u64", "s64"})
    bits = 8 * DTYPES[name].itemsize

    def function(a):
        a = np.asarray(a)
        raw = np.where(a < 0, ~a, a).astype(f"u{a.dtype.itemsize}")
        zeros = _leading_zeros(raw)
        found = zeros if "shiftamt" in instruction.modifiers else U32(bits - 1) - zeros
        return np.where(raw == 0, U32(0xFFFFFFFF), found).astype(U32)

    return elementwise(machine, instruction, [name], "u32", function)


@binds("dp4a", "dp2a")
def _dot_product(machine, instruction: Instruction) -> Callable:
    *half, first, second = instruction.modifiers
    if first not in ("u32", "s32") or second not in ("u32", "s32") or half not in ([], ["lo"], ["hi"]):
        raise PtxError("unknown form")
    if (instruction.base == "dp2a") != bool(half):
        raise PtxError("unknown form")
    result = "u32" if first == second == "u32" else "s32"
    wide = ("i1", "u1") if instruction.base == "dp4a" else ("i2", "u2")

    def parts(a, name: str, dtypes: tuple[str, str]) -> np.ndarray:
        signed, unsigned = dtypes
        raw = np.ascontiguousarray(np.atleast_1d(a)).view(signed if name == "s32" else unsigned)
        return raw.reshape(-1, 4 // np.dtype(signed).itemsize).astype(np.int64)

    def function(a, b, c):
        x, y = parts(a, first, wide), parts(b, second, ("i1", "u1"))
        if half:
            y = y[:, :2] if half == ["lo"] else y[:, 2:]
        total = (x * y).sum(1) + np.asarray(c).astype(np.int64)
        return total.astype(U32).view(DTYPES[result])

    return elementwise(machine, instruction, ["b32", "b32", result], result, function)
