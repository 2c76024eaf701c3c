"""Counts how often a kernel's instructions are issued, by following its machine code with a launch's real arguments.

Integers, predicates, addresses and shared memory are computed lane by lane as the hardware does; what comes from global
memory or floating-point arithmetic is "unknown". So every branch whose condition follows from the launch (shapes,
splits, tails) goes the way it goes on a card, and loops get their trip counts without anybody's estimate. A branch
on an unknown value is not taken, and its address is reported: these are the checks of data (NaN and the like).

The blocks of a launch do almost the same, so a few are followed and stand for the rest (:func:`walk_launch`).
"""

from __future__ import annotations

import collections
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from .sass import TENSOR, Instruction, Kernel, access_bytes, branch_target
from .sass_integer import HANDLERS
from .sass_lanes import (
    ALL,
    FULL,
    NO_REGISTER,
    NOTHING,
    Lanes,
    Shape,
    Unknown,
    Value,
    shape_of,
    unknown_results,
)

# Where the parameters start in constant bank 0, and where blockDim and gridDim are.
_PARAMETERS = {75: 0x160, 80: 0x160, 86: 0x160, 89: 0x160, 90: 0x210, 100: 0x380, 120: 0x380}
_FOLLOWED_BLOCKS = 8
_STEP_LIMIT = 2_000_000
_SHARED_BYTES = 1 << 18


@dataclass(frozen=True)
class Launch:
    """One launch: what the host gave the driver."""

    kernel: str  # mangled
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int  # dynamic
    parameters: bytes

    @property
    def blocks(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def warps(self) -> int:
        return self.blocks * -(-self.block[0] * self.block[1] * self.block[2] // 32)


@dataclass
class Buffer:
    """A range of addresses that the launch was given, by name."""

    name: str
    address: int
    size: int


@dataclass
class Traffic:
    """Loads of one buffer: warp requests by bytes a lane, and the 32-byte sectors they ask for."""

    requests: collections.Counter[int] = field(default_factory=collections.Counter)
    sectors: float = 0
    distinct: set[int] = field(default_factory=set)  # of the followed blocks


@dataclass
class Walk:
    """Sums over a launch (or over one block): warp instructions by index, and what they did."""

    kernel: Kernel
    issued: npt.NDArray[np.float64]
    before: float = 0  # of these, up to a warp's last barrier before its first tensor instruction
    quantizing: float = 0  # of those, from the first load of x on: what a kernel does that quantizes x for itself
    after: float = 0  # behind a warp's last tensor instruction
    loads: dict[str, Traffic] = field(default_factory=dict)
    assumed: set[int] = field(default_factory=set)  # addresses of branches on unknown values, not taken

    @property
    def total(self) -> float:
        return float(self.issued.sum())

    def add(self, other: Walk, times: float) -> None:
        self.issued += other.issued * times
        self.before += other.before * times
        self.quantizing += other.quantizing * times
        self.after += other.after * times
        self.assumed |= other.assumed
        for name, traffic in other.loads.items():
            mine = self.loads.setdefault(name, Traffic())
            mine.sectors += traffic.sectors * times
            mine.distinct |= traffic.distinct
            for size, requests in traffic.requests.items():
                mine.requests[size] += round(requests * times)


class Block:
    """The state that the warps of one block share."""

    def __init__(self, kernel: Kernel, launch: Launch, index: tuple[int, int, int], arrivals: int) -> None:
        self.kernel, self.launch, self.index = kernel, launch, index
        # What an atomic on a counter returns: how many blocks have been there before.
        self.arrivals = arrivals
        base = _PARAMETERS[kernel.arch]
        constants = np.zeros(base + len(launch.parameters) + 8, np.uint8)
        constants[base : base + len(launch.parameters)] = np.frombuffer(launch.parameters, np.uint8)
        sizes = np.array([*launch.block, *launch.grid], np.uint32).view(np.uint8)
        if kernel.arch < 100:
            constants[: len(sizes)] = sizes
        else:
            constants[0x360:0x36C], constants[0x370:0x37C] = sizes[:12], sizes[12:]
        literals = {bank: np.frombuffer(content + bytes(8), np.uint8) for bank, content in kernel.constants.items()}
        self.banks = {0: constants, **literals}
        self.shared = np.zeros(_SHARED_BYTES, np.uint8)
        self.shared_known = np.zeros(_SHARED_BYTES, bool)
        self.by_address = {instruction.address: i for i, instruction in enumerate(kernel.instructions)}
        self.shapes: dict[int, Shape] = {}


class Warp(Lanes):
    """32 lanes; those at the lowest address go first, so that they meet again where their ways join."""

    def __init__(self, block: Block, index: int, walk: Walk, buffers: list[Buffer]) -> None:
        super().__init__(block.banks)
        self.block, self.walk, self.buffers = block, walk, buffers
        threads = block.launch.block[0] * block.launch.block[1] * block.launch.block[2]
        self.thread = np.arange(32, dtype=np.int64) + 32 * index
        self.pcs = np.where(self.thread < threads, block.kernel.instructions[0].address, -1)
        self.pc: int | None = None  # of all lanes, where they are together
        self.issued = self.first_x = 0

    def special(self, name: str) -> npt.NDArray[np.int64]:
        x, y, _ = self.block.launch.block
        values = {
            "SR_TID.X": self.thread % x,
            "SR_TID.Y": self.thread // x % y,
            "SR_TID.Z": self.thread // (x * y),
            "SR_LANEID": np.arange(32),
            "SR_EQMASK": 1 << np.arange(32),
            "SR_LTMASK": (1 << np.arange(32)) - 1,
        }
        values |= {f"SR_CTAID.{axis}": np.full(32, self.block.index[i]) for i, axis in enumerate("XYZ")}
        values["SR_CgaCtaId"] = values["SR_CGACTAID"] = np.zeros(32, np.int64)
        if name not in values:
            raise Unknown
        return values[name].astype(np.int64)

    def run(self) -> Iterator[None]:
        """Until the end; yields at each barrier of the block."""
        code = self.block.kernel.instructions
        barrier = first_tensor = last_tensor = 0
        while True:
            if self.pc is None:
                alive = self.pcs[self.pcs >= 0]
                if not len(alive):
                    break
                address = int(alive.min())
                here = self.pcs == address
                if here.all():
                    self.pc, here = address, FULL
            else:
                address, here = self.pc, FULL
            if address not in self.block.by_address:
                raise ValueError(
                    f"sass_walk: {self.block.kernel.name} must stay in its code, got address {address:#x}; an "
                    "instruction that computes a branch target is not modelled"
                )
            i = self.block.by_address[address]
            instruction = code[i]
            self.walk.issued[i] += 1
            self.issued += 1
            if self.issued > _STEP_LIMIT:
                raise ValueError(
                    f"sass_walk: a warp must end within {_STEP_LIMIT} instructions, got a loop at {address:#x} of "
                    f"{self.block.kernel.name}; what its condition depends on is not modelled"
                )
            if instruction.name in TENSOR:
                if not first_tensor:
                    self.walk.before += barrier
                    self.walk.quantizing += max(0, barrier - self.first_x) if self.first_x else 0
                first_tensor, last_tensor = first_tensor or self.issued, self.issued
            following = code[i + 1].address if i + 1 < len(code) else -2
            if here is FULL:
                self.pc = following
            else:
                self.pcs[here] = following
            self.step(i, instruction, here)
            if instruction.name == "BAR":
                barrier = self.issued
                yield
        self.walk.after += self.issued - last_tensor if last_tensor else 0

    def step(self, i: int, instruction: Instruction, here: npt.NDArray[np.bool_]) -> None:
        name = instruction.name
        guard = self.predicate(instruction.guard) if instruction.guard else None
        if name in ("BRA", "EXIT", "RET", "CALL", "BRX", "JMP"):
            self.jump(instruction, here, guard or Value(ALL, FULL))
            return
        if guard is None:
            active, unsure = here, NOTHING.known
        else:
            active, unsure = here & guard.known & (guard.bits != 0), here & ~guard.known
        if name in ("LDG", "LDGSTS", "LD"):
            self.count_load(instruction, active if guard is None else active | unsure)
        if name in NO_REGISTER:
            if name == "STS":
                self.store_shared(instruction, active, unsure)
            return
        shape = self.block.shapes.get(i)
        if shape is None:
            shape = self.block.shapes[i] = shape_of(instruction)
        modelled = name in HANDLERS or name in ("LDS", "ATOMG", "ATOM")
        if not modelled or any(self.registers.get(source, NOTHING) is NOTHING for source in shape.hides):
            for target in shape.targets:
                self.write(target, NOTHING, active, unsure)
            return
        try:
            if name in ("LDS", "ATOMG", "ATOM"):
                results = self.load_shared(instruction) if name == "LDS" else self.atomic(instruction)
            else:
                results = HANDLERS[name](self, instruction, active)
        except Unknown:
            results = unknown_results(instruction)
        for target, value in results:
            self.write(target, value if value.known.any() else NOTHING, active, unsure)

    def jump(self, instruction: Instruction, here: npt.NDArray[np.bool_], guard: Value) -> None:
        condition, known = guard.bits != 0, guard.known
        if "DIV" in instruction.modifiers:  # to the code for lanes that have parted, if they have
            return
        for operand in instruction.operands:
            if operand.lstrip("!").startswith(("P", "UP")):
                value = self.predicate(operand)
                condition, known = condition & (value.bits != 0), known & value.known
        if (here & ~known).any():
            self.walk.assumed.add(instruction.address)
        taken = here & condition & known
        if not taken.any():
            return
        if self.pc is not None:  # they may part here
            self.pcs[:], self.pc = self.pc, None
        if instruction.name == "EXIT":
            self.pcs[taken] = -1
        elif instruction.name == "RET":
            back = self.read(instruction.operands[0])
            self.pcs[taken] = np.where(back.known, back.bits, -3)[taken]
        elif instruction.name in ("BRA", "CALL") and (target := branch_target(instruction)) is not None:
            self.pcs[taken] = target
        else:
            raise ValueError(f"sass_walk: a jump must name its target, got {instruction}; it is not modelled")

    def count_load(self, instruction: Instruction, lanes: npt.NDArray[np.bool_]) -> None:
        operand = [o for o in instruction.operands if "[" in o][-1]
        address = self.address(operand, of_global=True)
        lanes = lanes & address.known
        size = access_bytes(instruction)
        if not lanes.any():
            return
        at = address.bits[lanes]
        for buffer in self.buffers:
            if buffer.address <= at[0] < buffer.address + buffer.size:
                if buffer.name == "x" and not self.first_x:
                    self.first_x = self.issued
                traffic = self.walk.loads.setdefault(buffer.name, Traffic())
                sectors = set((at // 32).tolist()) | set(((at + size - 1) // 32).tolist())
                traffic.requests[size] += 1
                traffic.sectors += len(sectors)
                traffic.distinct |= sectors

    def store_shared(
        self, instruction: Instruction, active: npt.NDArray[np.bool_], unsure: npt.NDArray[np.bool_]
    ) -> None:
        address, size = self.address(instruction.operands[0]), access_bytes(instruction)
        shared, known = self.block.shared, self.block.shared_known
        values = self.read_words(instruction.operands[1], max(1, size // 4))
        for lane in np.flatnonzero((active | unsure) & address.known):
            at = int(address.bits[lane]) & (_SHARED_BYTES - 1)
            word = b"".join(int(value.bits[lane]).to_bytes(4, "little") for value in values)[:size]
            shared[at : at + size] = np.frombuffer(word, np.uint8)
            known[at : at + size] = active[lane] and all(value.known[lane] for value in values)

    def load_shared(self, instruction: Instruction) -> list[tuple[str, Value]]:
        results = unknown_results(instruction)
        address, size = self.address(instruction.operands[1]), access_bytes(instruction)
        at = address.bits & (_SHARED_BYTES - 1)
        for i, (_, value) in enumerate(results):
            width = min(size, 4)
            places = np.minimum(at[:, None] + 4 * i + np.arange(width), _SHARED_BYTES - 1)
            raw = self.block.shared[places].astype(np.int64)
            value.bits[:] = (raw << (8 * np.arange(width))).sum(1)
            value.known[:] = address.known & self.block.shared_known[places].all(1)
        return results

    def atomic(self, instruction: Instruction) -> list[tuple[str, Value]]:
        results = unknown_results(instruction)
        for target, value in results:
            if target.startswith("R"):
                value.bits[:], value.known[:] = self.block.arrivals, True
        return results


def walk_block(
    kernel: Kernel, launch: Launch, index: tuple[int, int, int], buffers: list[Buffer], arrivals: int = 0
) -> Walk:
    """Follow the warps of one block.

    Args:
        arrivals: what atomics return: the number of blocks that have arrived before.
    """
    walk = Walk(kernel, np.zeros(len(kernel.instructions)))
    block = Block(kernel, launch, index, arrivals)
    warps = -(-launch.block[0] * launch.block[1] * launch.block[2] // 32)
    running = [Warp(block, i, walk, buffers).run() for i in range(warps)]
    finished = object()
    while running:
        running = [warp for warp in running if next(warp, finished) is not finished]
    return walk


def walk_launch(kernel: Kernel, launch: Launch, buffers: list[Buffer]) -> Walk:
    """Sums over all blocks. Those of a small grid are all followed; along each axis of a larger one the first block
    stands for all but the last one. Of the blocks that share a counter (grid.y) the last one finds the others
    arrived."""
    total = Walk(kernel, np.zeros(len(kernel.instructions)))
    nx, ny, nz = launch.grid
    if nz != 1:
        raise ValueError(f"walk_launch: grids must have two dimensions, got {launch.grid}; follow blocks by walk_block")
    small = nx * ny <= _FOLLOWED_BLOCKS
    for x, times_x in (dict.fromkeys(range(nx), 1) if small else {nx - 1: 1, 0: max(nx - 1, 1)}).items():
        for y, times_y in (dict.fromkeys(range(ny), 1) if small else {ny - 1: 1, 0: max(ny - 1, 1)}).items():
            arrivals = ny - 1 if y == ny - 1 else 0
            total.add(walk_block(kernel, launch, (x, y, 0), buffers, arrivals), times_x * times_y)
    return total
