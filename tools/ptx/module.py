"""A module of PTX in memory: variables, kernels, and each kernel's instructions with their operands."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Address", "Immediate", "Instruction", "Kernel", "Module", "PtxError", "Symbol", "Variable"]


class PtxError(Exception):
    """Something is wrong with the PTX, or with what it did when executed."""


@dataclass(frozen=True)
class Immediate:
    """A constant operand: an integer, or the bits of a float of `float_bytes`."""

    value: int
    float_bytes: int = 0


@dataclass(frozen=True)
class Symbol:
    """The address of a variable, or a label."""

    name: str
    offset: int = 0


@dataclass(frozen=True)
class Address:
    """[base + offset]; base is a register name, a Symbol, or None for an absolute address."""

    base: str | Symbol | None
    offset: int


@dataclass
class Variable:
    """A variable of the module or of a kernel; size 0 with extern means as many bytes as the launch asks for."""

    name: str
    space: str
    size: int
    align: int
    initial: bytes = b""
    extern: bool = False
    pointers: list[tuple[int, Symbol]] = field(default_factory=list)


@dataclass
class Instruction:
    """opcode ``base.modifiers``; operands are register names, Immediate, Symbol, Address or tuples (vectors)."""

    text: str
    line: int
    base: str
    modifiers: tuple[str, ...]
    operands: tuple
    guard: str | None = None
    negated: bool = False
    target: int = -1

    def __str__(self) -> str:
        return f"line {self.line}: {self.text}"


@dataclass
class Kernel:
    name: str
    parameters: list[Variable]
    registers: dict[str, str]
    variables: list[Variable]
    instructions: list[Instruction]
    labels: dict[str, int]
    required_threads: tuple[int, ...] = ()
    most_threads: tuple[int, ...] = ()

    def leaders(self) -> list[int]:
        """First instructions of the basic blocks, ascending."""
        starts = {0, *self.labels.values()}
        for place, instruction in enumerate(self.instructions):
            if instruction.base in ("bra", "ret", "exit"):
                starts.add(place + 1)
        return sorted(start for start in starts if start < len(self.instructions))


@dataclass
class Module:
    target: str
    version: str
    variables: list[Variable]
    kernels: dict[str, Kernel]

    def kernel(self, name: str) -> Kernel:
        """The kernel of that name, or the only one whose (mangled) name contains it."""
        if name in self.kernels:
            return self.kernels[name]
        found = [kernel for full, kernel in self.kernels.items() if name in full]
        if len(found) != 1:
            raise PtxError(
                f"Module.kernel: a name must select one kernel, got {name!r} for {len(found)} of "
                f"{sorted(self.kernels)}; write more of it"
            )
        return found[0]
