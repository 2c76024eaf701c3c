"""A bench for single instructions: a kernel around a few lines of PTX, one element per thread."""

from __future__ import annotations

import numpy as np

from . import Memory, launch, parse
from .counters import Counters

__all__ = ["HEADER", "evaluate", "kernel", "run"]

HEADER = ".version 9.0\n.target sm_80\n.address_size 64\n"
_REGISTERS = ".reg .pred %p<8>;\n.reg .b16 %h<8>;\n.reg .b32 %r<32>;\n.reg .b64 %x<16>;\n"


def kernel(body: str, parameters: int = 0, declarations: str = "", name: str = "test") -> str:
    """A module with one kernel: u64 parameters p0, p1, ...; registers %p<8> %h<8> %r<32> %x<16>; body; ret."""
    names = ", ".join(f".param .u64 p{i}" for i in range(parameters))
    return f"{HEADER}.visible .entry {name}({names})\n{{\n{_REGISTERS}{declarations}\n{body}\nret;\n}}\n"


def run(text: str, memory: Memory, *arguments: object, grid=1, block=32, **options: object) -> Counters:
    return launch(parse(text), "test", memory, grid, block, list(arguments), **options)


def evaluate(
    body: str, inputs: dict[str, np.ndarray], outputs: dict[str, str], block: int = 128
) -> dict[str, np.ndarray]:
    """Runs the body once for each element. Inputs are in registers of their names; returns the registers that `outputs`
    names, in its dtypes. Elements have 2, 4 or 8 bytes. Some threads of the last block do nothing."""
    count = len(next(iter(inputs.values())))
    memory = Memory()
    lines, registers, arguments = [], "", []

    def access(name: str, size: int, index: int) -> str:
        return (
            f"ld.param.u64 %x0, [p{index}];\nmul.wide.u32 %x1, %r0, {size};\nadd.s64 %x0, %x0, %x1;\n"
            f"{'ld' if name in inputs else 'st'}.global.b{8 * size} "
        )

    for name, array in inputs.items():
        size = array.dtype.itemsize
        registers += f".reg .b{8 * size} %{name};\n"
        lines.append(access(name, size, len(arguments)) + f"%{name}, [%x0];")
        arguments.append(memory.allocate(name, array))
    lines.append(body)
    results = {}
    for name, dtype in outputs.items():
        size = np.dtype(dtype).itemsize
        registers += f".reg .b{8 * size} %{name};\n"
        lines.append(access(name, size, len(arguments)) + f"[%x0], %{name};")
        results[name] = memory.output(name, count, dtype)
        arguments.append(results[name])
    start = f"""
mov.u32 %r0, %ctaid.x; mov.u32 %r1, %ntid.x; mov.u32 %r2, %tid.x;
mad.lo.u32 %r0, %r0, %r1, %r2;
setp.ge.u32 %p0, %r0, {count};
@%p0 ret;
"""
    text = kernel(start + "\n".join(lines), len(arguments), registers)
    run(text, memory, *arguments, grid=-(-count // block), block=min(block, -(-count // 32) * 32))
    return {name: buffer.numpy() for name, buffer in results.items()}
