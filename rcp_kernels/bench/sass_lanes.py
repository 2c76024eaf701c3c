"""The lanes of a warp as numpy vectors: registers, predicates and operands of machine code, as far as known."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .sass import Instruction

Bits = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

ALL: Bits = np.ones(32, np.int64)
FULL: Bools = np.ones(32, bool)
MASK = 0xFFFFFFFF
# Instructions that write no register.
NO_REGISTER = frozenset(
    "BAR BMOV BPT BREAK BSSY BSYNC BSYNC CCTL CCTLL CCTLT DEPBAR ERRBAR EXIT LDGDEPBAR LDGSTS MEMBAR NANOSLEEP NOP RED "
    "REDG ST STG STL STS WARPSYNC YIELD ACQBULK UCGABAR_ARV UCGABAR_WAIT ELECT FENCE PREEXIT UTMAPF WARPGROUP".split()
)


class Unknown(Exception):
    """The instruction's result does not follow from what is known."""


@dataclass
class Value:
    """32 lanes of 32 (addresses: 64) bits, and in which of them they are known."""

    bits: Bits
    known: Bools


Results = list[tuple[str, Value]]
# Known in no lane. Nobody writes into it.
NOTHING = Value(np.zeros(32, np.int64), np.zeros(32, bool))


def nothing() -> Value:
    return Value(np.zeros(32, np.int64), np.zeros(32, bool))


# Instructions whose result is unknown in all lanes as soon as one source register is.
_STRICT = frozenset(
    "LOP3 ULOP3 IMAD UIMAD IMNMX VIMNMX IADD3 IADD VIADD LEA SHF PRMT MOV UMOV UIADD3 USHF ULEA IABS POPC R2UR SGXT "
    "BMSK I2F F2I MUFU".split()
)


@dataclass(frozen=True)
class Shape:
    """What is wanted of an instruction each time it is issued."""

    targets: tuple[str, ...]
    hides: tuple[str, ...]  # registers that make its results unknown


def shape_of(instruction: Instruction) -> Shape:
    registers, predicates, sources = targets_of(instruction)
    names = re.findall(r"\bU?R\d+\b", " ".join(sources)) if instruction.name in _STRICT else []
    return Shape(tuple(registers + predicates), tuple(names))


def is_predicate(operand: str) -> bool:
    return re.fullmatch(r"[!~]?U?P[0-7T]", operand) is not None


def is_register(operand: str) -> bool:
    return re.fullmatch(r"U?R(\d+|Z)", operand) is not None


def _width(instruction: Instruction) -> int:
    """Registers that the result takes."""
    name, modifiers = instruction.name, instruction.modifiers
    if name in ("HMMA", "IMMA"):
        shape = next((m for m in modifiers if m.isdigit()), "")
        return 2 if shape in ("8816", "8832", "884") or "F16" in modifiers else 4
    if name == "LDSM":
        return int(modifiers[-1]) if modifiers and modifiers[-1].isdigit() else 1
    if name == "CS2R":
        return 1 if "32" in modifiers else 2
    if "128" in modifiers:
        return 4
    if "64" in modifiers or "WIDE" in modifiers or name.startswith("D"):
        return 2 if name not in ("SHF", "DEPBAR") else 1
    return 1


@functools.cache
def targets_of(instruction: Instruction) -> tuple[list[str], list[str], list[str]]:
    """Result registers, result predicates, sources. Results come first: predicates, then a register, then predicates
    again (a carry), as far as they are not the first source."""
    operands = list(instruction.operands)
    predicates: list[str] = []
    while operands and is_predicate(operands[0]):
        predicates.append(operands.pop(0))
    registers: list[str] = []
    if operands and is_register(operands[0]) and not (predicates and instruction.name in _ONLY_PREDICATES):
        first = operands.pop(0)
        registers = [next_register(first, i) for i in range(_width(instruction))]
        while instruction.name in _CARRIES and operands and is_predicate(operands[0]):
            predicates.append(operands.pop(0))
    return registers, predicates, operands


_ONLY_PREDICATES = frozenset("ISETP UISETP FSETP HSETP2 DSETP PLOP3 UPLOP3 R2P".split())
_CARRIES = frozenset("IADD3 UIADD3 IADD LEA ULEA IMAD UIMAD".split())


def next_register(register: str, i: int) -> str:
    if register.endswith("RZ"):
        return register
    prefix = "UR" if register.startswith("UR") else "R"
    return f"{prefix}{int(register[len(prefix) :]) + i}"


def unknown_results(instruction: Instruction) -> Results:
    registers, predicates, _ = targets_of(instruction)
    return [(target, nothing()) for target in registers + predicates]


def signed(bits: Bits) -> Bits:
    return (bits & MASK) - ((bits & 0x80000000) << 1)


class Lanes:
    """Registers and predicates of 32 lanes, and the banks of constants."""

    def __init__(self, banks: dict[int, npt.NDArray[np.uint8]]) -> None:
        self.banks = banks
        self.registers: dict[str, Value] = {}

    def special(self, name: str) -> Bits:
        raise Unknown

    def write(self, target: str, value: Value, active: Bools, unsure: Bools) -> None:
        """Into the active lanes; in the unsure ones, where the guard is unknown, the target becomes unknown."""
        if target in ("RZ", "URZ", "PT", "UPT"):
            return
        if value is NOTHING and active is FULL:
            self.registers[target] = NOTHING
            return
        old = self.registers.get(target) or Value(np.zeros(32, np.int64), FULL)
        if target.startswith("U"):  # the same in all lanes
            lanes = np.flatnonzero(active)
            if len(lanes):
                self.registers[target] = Value(
                    np.full(32, value.bits[lanes[0]]), np.full(32, bool(value.known[lanes[0]]))
                )
            elif unsure.any():
                self.registers[target] = nothing()
            return
        if active is FULL:
            self.registers[target] = value
            return
        bits = np.where(active, value.bits, old.bits)
        known = np.where(active, value.known, old.known & ~unsure)
        self.registers[target] = Value(bits, known)

    def predicate(self, operand: str) -> Value:
        name = operand.lstrip("!~")
        if name in ("PT", "UPT"):
            value = Value(ALL, FULL)
        else:
            value = self.registers.get(name) or Value(np.zeros(32, np.int64), FULL)
        return Value(1 - value.bits, value.known) if operand[0] in "!~" else value

    def constant(self, operand: str, offset: int = 0) -> Value:
        found = re.fullmatch(r"c\[0x(\d)\]\[(?:(U?R(?:\d+|Z))\+?)?(-?0x[0-9a-f]+)?\]", operand)
        bank = self.banks.get(int(found[1], 16)) if found else None
        if found is None or bank is None:
            raise Unknown
        at = np.full(32, int(found[3] or "0", 16) + offset)
        known = FULL
        if found[2]:
            index = self.read(found[2])
            at, known = at + index.bits, index.known
        inside = (at >= 0) & (at + 4 <= len(bank))
        places = np.where(inside, at, 0)[:, None] + np.arange(4)
        bits = (bank[places].astype(np.int64) << (8 * np.arange(4))).sum(1)
        return Value(bits, known & inside)

    def read(self, operand: str) -> Value:
        """32 bits of a register, a constant or an immediate, with its sign, absolute value or inversion."""
        operand = operand.replace(".reuse", "")
        if operand.startswith("-") and not re.match(r"-(0x|\d)", operand):
            value = self.read(operand[1:])
            return Value(-value.bits & MASK, value.known)
        if operand.startswith("~"):
            value = self.read(operand[1:])
            return Value(~value.bits & MASK, value.known)
        if operand.startswith("|"):
            value = self.read(operand.strip("|"))
            return Value(np.abs(signed(value.bits)) & MASK, value.known)
        operand = re.sub(r"\.(64|U32)$", "", operand)
        if operand in ("RZ", "URZ", "SRZ"):
            return Value(np.zeros(32, np.int64), FULL)
        if is_register(operand):
            return self.registers.get(operand) or NOTHING
        if operand.startswith("c["):
            return self.constant(operand)
        if re.fullmatch(r"-?(0x[0-9a-f]+|\d+)", operand):
            return Value(np.full(32, int(operand, 0) & MASK), FULL)
        raise Unknown

    def read_words(self, operand: str, count: int) -> list[Value]:
        """`count` registers, or constants, in a row."""
        operand = operand.replace(".reuse", "")
        if operand.startswith("c["):
            return [self.constant(operand, 4 * i) for i in range(count)]
        if not is_register(operand):
            low = self.read(operand)
            high = np.where(low.bits >> 31, MASK if operand.startswith("-") else 0, 0)
            return [low, *(Value(high, low.known) for _ in range(count - 1))]
        return [self.read(next_register(operand, i)) for i in range(count)]

    def read_wide(self, operand: str) -> Value:
        """64 bits, as a number modulo 2^64 in int64."""
        low, high = self.read_words(operand, 2)
        return Value(low.bits | (high.bits << 32), low.known & high.known)

    def address(self, operand: str, of_global: bool = False) -> Value:
        """``[R2.64+UR4+0x10]``, ``desc[UR4][R2.64+0x10]``, ``[R3.X16+UR5]``; on sm_75 also ``[R2]`` for ``[R2.64]``."""
        inner = operand[operand.rindex("[") + 1 : operand.rindex("]")]
        if of_global and ".64" not in inner:
            inner = re.sub(r"\bR(\d+)\b(?!\.)", r"R\1.64", inner, count=1)
        bits, known, wide = np.zeros(32, np.int64), FULL, False
        for term in re.sub(r"\+-", "-", inner).replace("-", "+-").split("+"):
            if not term:
                continue
            if re.fullmatch(r"-?(0x[0-9a-f]+|\d+)", term):
                bits = bits + int(term, 0)
                continue
            register, _, suffix = term.partition(".")
            if suffix == "64":
                value, wide = self.read_wide(register), True
            elif wide or (register.startswith("UR") and ".64" in inner):
                value = self.read_wide(register) if register.startswith("UR") else self.read(register)
            else:
                value = self.read(register)
                if suffix == "U32":
                    wide = True
            scale = int(suffix[1:]) if re.fullmatch(r"X\d+", suffix) else 1
            bits, known = bits + value.bits * scale, known & value.known
        return Value(bits if wide or ".64" in inner else bits & MASK, known)
