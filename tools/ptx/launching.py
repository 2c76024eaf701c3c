"""Launches: arguments, blocks and their order."""

from __future__ import annotations

import random

import numpy as np

from .counters import Counters
from .machine import Launch, Machine
from .memory import Buffer, Memory
from .module import Kernel, Module, PtxError

__all__ = ["launch", "pack_arguments"]


def _three(size: int | tuple) -> tuple[int, int, int]:
    size = (size,) if isinstance(size, int) else tuple(size)
    return (*size, 1, 1)[:3]


def pack_arguments(kernel: Kernel, arguments: list | tuple) -> bytes:
    """Parameter bytes: a Buffer gives its address; an int or float takes the size of its parameter; bytes and ctypes
    structures are copied."""
    if len(arguments) != len(kernel.parameters):
        raise PtxError(
            f"launch: {kernel.name} takes {len(kernel.parameters)} parameters, got {len(arguments)}; pass each"
        )
    packed = b""
    for argument, parameter in zip(arguments, kernel.parameters, strict=True):
        packed += bytes(-len(packed) % parameter.align)
        if isinstance(argument, Buffer):
            argument = argument.address
        if isinstance(argument, float):
            data = np.array(argument, {2: "<f2", 4: "<f4", 8: "<f8"}[parameter.size]).tobytes()
        elif isinstance(argument, (bool, int)):
            data = (int(argument) & (2 ** (8 * parameter.size) - 1)).to_bytes(parameter.size, "little")
        else:
            data = argument.tobytes() if isinstance(argument, (np.generic, np.ndarray)) else bytes(argument)
        if len(data) != parameter.size:
            raise PtxError(
                f"launch: {parameter.name} of {kernel.name} has {parameter.size} bytes, got {len(data)}; pass a struct "
                "of its size"
            )
        packed += data
    return packed


def launch(
    module: Module,
    name: str,
    memory: Memory,
    grid: int | tuple,
    block: int | tuple,
    arguments: list | tuple | bytes,
    shared_bytes: int = 0,
    order: str | int = "ascending",
    blocks_at_once: int | None = None,
    races: bool = True,
    count_memory: bool = True,
    most_issues: int = 50_000_000,
    early_buffers: tuple[str, ...] | None = None,
) -> Counters:
    """Executes a kernel.

    Args:
        module: of :func:`ptx.parse`.
        name: of the kernel, or a part of its mangled name that no other has.
        memory: that its buffers are in.
        grid, block: an int, or up to three.
        arguments: one for each parameter (see :func:`pack_arguments`), or all their bytes.
        shared_bytes: of dynamic shared memory.
        order: of the blocks: "ascending", "descending", or the seed of a random order.
        blocks_at_once: how many blocks run in lockstep; None takes as many as make 8192 lanes. 1 finishes each block
            before the next starts.
        races: whether accesses that nothing orders are looked for, in shared memory and between blocks.
        count_memory: whether sectors and bank conflicts are counted.
        most_issues: instructions of one set of blocks, after which a loop counts as endless.
        early_buffers: the launch may begin before the previous one has ended (programmatic dependent launch). Names of
            the buffers that no previous launch writes: before griddepcontrol.wait only these may be loaded. None for
            an ordinary launch.

    Raises:
        PtxError: whatever is wrong with the kernel or its accesses.
    """
    kernel = module.kernel(name)
    options = Launch(_three(grid), _three(block), shared_bytes, races, count_memory, most_issues, early_buffers)
    threads = int(np.prod(options.block))
    required = (*kernel.required_threads, 1, 1)[:3] if kernel.required_threads else options.block
    most = int(np.prod(kernel.most_threads)) if kernel.most_threads else 1024
    if not 1 <= threads <= most or required != options.block or min(options.grid) < 1:
        raise PtxError(
            f"launch: {kernel.name} takes blocks of {required if kernel.required_threads else f'1 to {most}'} threads "
            f"and a grid of at least one block, got block {options.block} and grid {options.grid}"
        )
    packed = arguments if isinstance(arguments, bytes) else pack_arguments(kernel, arguments)
    x, y, z = options.grid
    blocks = [(i, j, k) for k in range(z) for j in range(y) for i in range(x)]
    if order == "descending":
        blocks.reverse()
    elif order != "ascending":
        random.Random(order).shuffle(blocks)
    machine = Machine(module, kernel, memory, packed, options)
    at_once = blocks_at_once or max(1, 8192 // machine.lanes_per_block)
    with np.errstate(all="ignore"):
        for first in range(0, len(blocks), at_once):
            machine.start(blocks[first : first + at_once])
            machine.run()
    counters = machine.finish()
    counters.early = early_buffers is not None
    counters.blocks, counters.threads = len(blocks), threads * len(blocks)
    return counters
