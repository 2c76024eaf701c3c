"""Executes the PTX that nvcc and Triton emitted, on the CPU, with all threads of many blocks as lanes of numpy arrays.

    module = parse(compile_ptx(source, arch="sm_80"))       # nvcc, cached by content; csrc/include is on its path
    memory = Memory()                                       # global memory, which outlives a launch
    x = memory.allocate("x", array)                         # read-only; writable=True; misaligned=2
    y = memory.output("y", (tokens, rows), np.float16)      # uninitialised: to read it before it is written is an error
    counters = launch(module, "kernel", memory, grid=64, block=128, arguments=[x, y, 3], order="descending")
    y.numpy()                                               # an error if an element was never written
    counters.thread_instructions, counters.buffers["x"].requested_sectors, counters.bank_conflicts()

    program = HostProgram(source, arch="sm_80")             # host code too: its launches are executed
    result, counters = program.call("run", memory, x, y, 3)

A :class:`PtxError` names the kernel, the instruction with its line, the thread, the address and the nearest buffer. It
is raised for accesses out of bounds, misaligned, to read-only or of uninitialised memory; for unordered accesses to
shared memory, and to global memory by different blocks, whatever the order of execution; for barriers and warp-wide
instructions that not all reach; for asynchronous copies that are not waited for; and for instructions that the executor
does not know.

What it is not: a model of time. Blocks run in an order that can be chosen, approximations (ex2.approx and its like) are
as exact as the format allows, and sums inside an mma of floats are rounded once, where a GPU may truncate.
"""

from .build import compile_ptx, compile_ptx_file
from .counters import Counters
from .host import HostProgram
from .launching import launch
from .memory import Buffer, Memory
from .module import Module, PtxError
from .parser import parse

__all__ = [
    "Buffer",
    "Counters",
    "HostProgram",
    "Memory",
    "Module",
    "PtxError",
    "compile_ptx",
    "compile_ptx_file",
    "launch",
    "parse",
]
