"""Addresses of a kernel's variables and parameters."""

from __future__ import annotations

import numpy as np

from .memory import Memory
from .module import Address, Instruction, Kernel, Module, PtxError, Symbol, Variable
from .parser import TYPE_BYTES

__all__ = ["Layout", "narrowest_shared"]

SHARED_LIMIT = 227 << 10


class Layout:
    """Addresses of a kernel's variables in their spaces, and of the module's in global memory, where they are put.

    Args:
        shared_bytes: of dynamic shared memory, which comes after the static one.
    """

    def __init__(self, module: Module, kernel: Kernel, memory: Memory, shared_bytes: int) -> None:
        self.module, self.memory = module, memory
        self.symbols: dict[str, int] = {}
        self.spaces: dict[str, str] = {}
        shared, self.local = 0, 0
        dynamic = []
        used = {name for instruction in kernel.instructions for name in _symbols(instruction.operands)}
        for variable in [*module.variables, *kernel.variables]:
            self.spaces[variable.name] = variable.space
            if variable.space == "shared":
                if variable.extern:
                    dynamic.append(variable)
                elif variable in kernel.variables or variable.name in used:
                    shared = -(-shared // variable.align) * variable.align
                    self.symbols[variable.name] = shared
                    shared += variable.size
            elif variable.space == "local":
                self.local = -(-self.local // variable.align) * variable.align
                self.symbols[variable.name] = self.local
                self.local += variable.size
            else:
                self.symbols[variable.name] = self._module_variable(variable)
        align = max([16, *(variable.align for variable in dynamic)])
        if dynamic:
            shared = -(-shared // align) * align
        for variable in dynamic:
            self.symbols[variable.name] = shared
        self.shared = shared + shared_bytes
        if self.shared > SHARED_LIMIT:
            raise PtxError(
                f"launch: a block has {SHARED_LIMIT} bytes of shared memory at most, got {self.shared} for "
                f"{kernel.name}; make its tiles smaller"
            )
        self.parameters: dict[str, int] = {}
        self.parameter_bytes = 0
        for parameter in kernel.parameters:
            start = -(-self.parameter_bytes // parameter.align) * parameter.align
            self.parameters[parameter.name] = start
            self.parameter_bytes = start + parameter.size

    def _module_variable(self, variable: Variable) -> int:
        key = (id(self.module), variable.name)
        if key not in self.memory.variables:
            data = np.zeros(variable.size, np.uint8)
            data[: len(variable.initial)] = np.frombuffer(variable.initial, np.uint8)
            for place, symbol in variable.pointers:
                (other,) = (other for other in self.module.variables if other.name == symbol.name)
                address = self._module_variable(other) + symbol.offset
                data[place : place + 8] = np.frombuffer(np.uint64(address).tobytes(), np.uint8)
            buffer = self.memory.allocate(variable.name, data, writable=variable.space == "global")
            # With the module, whose id another one could have if it were gone.
            self.memory.variables[key] = (buffer, self.module)
        return self.memory.variables[key][0].address

    def address(self, name: str) -> int:
        """The address of a variable or parameter in its space."""
        for table in (self.symbols, self.parameters):
            if name in table:
                return table[name]
        raise PtxError(f"{name} is not a variable")


def _symbols(operands: tuple) -> list[str]:
    found = []
    for operand in operands:
        if isinstance(operand, tuple):
            found += _symbols(operand)
        base = operand.base if isinstance(operand, Address) else operand
        if isinstance(base, Symbol):
            found.append(base.name)
    return found


def narrowest_shared(instruction: Instruction) -> int:
    """Bytes of the narrowest element that the instruction may access in shared memory."""
    if instruction.base in ("ld", "st", "atom", "red"):
        if {"global", "local", "const", "param"} & set(instruction.modifiers):
            return 4
        return min(4, TYPE_BYTES[instruction.modifiers[-1]])
    return 4
