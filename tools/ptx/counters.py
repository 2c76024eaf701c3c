"""Counts of a launch: instructions, sectors of global memory, bank conflicts, barriers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from .module import Instruction, Kernel

__all__ = ["Accesses", "BufferTraffic", "Counters"]

SECTOR = 32
BANKS = 32


@dataclass
class Accesses:
    """Requests of warps by one instruction to global memory (32-byte sectors) or shared memory (wavefronts).

    requests: warps that had at least one lane access memory.
    sectors, used_bytes: distinct sectors of each request, and the distinct bytes in them that were asked for.
    wavefronts, ideal: passes over the 32 banks that the requests took, and that they would take without conflicts.
    """

    requests: int = 0
    sectors: int = 0
    used_bytes: int = 0
    wavefronts: int = 0
    ideal: int = 0

    @property
    def bank_conflicts(self) -> int:
        return self.wavefronts - self.ideal


@dataclass
class BufferTraffic:
    """A buffer's loads: sectors requested by warps, how many different ones, and its bytes that were read."""

    requested_sectors: int
    distinct_sectors: int
    used_bytes: int
    most_requests: int

    @property
    def fetched_bytes(self) -> int:
        return self.requested_sectors * SECTOR


@dataclass
class Counters:
    """Counts of one launch. `per_instruction` and `lanes` are by index into `kernel.instructions`."""

    kernel: Kernel
    per_instruction: np.ndarray  # int64: issues, one a warp
    lanes: np.ndarray  # int64: executions by threads that no guard turned off
    global_loads: dict[int, Accesses] = field(default_factory=dict)
    global_stores: dict[int, Accesses] = field(default_factory=dict)
    shared: dict[int, Accesses] = field(default_factory=dict)
    buffers: dict[str, BufferTraffic] = field(default_factory=dict)
    barriers: int = 0  # passed by a block
    blocks: int = 0
    threads: int = 0
    uses_local_memory: bool = False
    early: bool = False  # may begin before the previous launch has ended

    @property
    def warp_instructions(self) -> int:
        """Issued instructions of PTX, one a warp."""
        return int(self.per_instruction.sum())

    @property
    def thread_instructions(self) -> int:
        """Issued instructions of PTX times 32, the numerator of "instructions per weight"."""
        return 32 * self.warp_instructions

    def by_opcode(self) -> Counter[str]:
        """Issues by warps per opcode with its modifiers."""
        counts: Counter[str] = Counter()
        for instruction, count in zip(self.kernel.instructions, self.per_instruction.tolist(), strict=True):
            counts[".".join((instruction.base, *instruction.modifiers))] += count
        return +counts

    def by_class(self) -> Counter[str]:
        """Issues by warps per first word of the opcode, loads and stores with their space."""
        counts: Counter[str] = Counter()
        for instruction, count in zip(self.kernel.instructions, self.per_instruction.tolist(), strict=True):
            counts[instruction_class(instruction)] += count
        return +counts

    def basic_blocks(self) -> list[tuple[int, int, int]]:
        """(first instruction, one past its last, issues of its first by warps) of every basic block."""
        starts = self.kernel.leaders()
        ends = [*starts[1:], len(self.kernel.instructions)]
        return [(start, end, int(self.per_instruction[start])) for start, end in zip(starts, ends, strict=True)]

    def bank_conflicts(self) -> int:
        """Wavefronts beyond those without conflicts, all instructions together."""
        return sum(accesses.bank_conflicts for accesses in self.shared.values())

    def __add__(self, other: Counters) -> Counters:
        """The sum of two launches of the same kernel."""
        total = Counters(self.kernel, self.per_instruction + other.per_instruction, self.lanes + other.lanes)
        for name in ("global_loads", "global_stores", "shared"):
            mine = getattr(total, name)
            for part in (getattr(self, name), getattr(other, name)):
                for place, accesses in part.items():
                    add(mine.setdefault(place, Accesses()), accesses)
        for name in ("barriers", "blocks", "threads"):
            setattr(total, name, getattr(self, name) + getattr(other, name))
        total.uses_local_memory = self.uses_local_memory or other.uses_local_memory
        return total


def add(total: Accesses, part: Accesses) -> None:
    for name in ("requests", "sectors", "used_bytes", "wavefronts", "ideal"):
        setattr(total, name, getattr(total, name) + getattr(part, name))


def instruction_class(instruction: Instruction) -> str:
    spaces = ("global", "shared", "local", "const", "param")
    space = next((word.split(":")[0] for word in instruction.modifiers if word.split(":")[0] in spaces), "")
    if instruction.base in ("ld", "st", "atom", "red", "cp") and space:
        return f"{instruction.base}.{space}"
    return instruction.base


def _firsts(values: np.ndarray) -> np.ndarray:
    """True at the first value and wherever sorted values change."""
    first = np.ones(values.size, bool)
    np.not_equal(values[1:], values[:-1], out=first[1:])
    return first


def _different(values: np.ndarray) -> np.ndarray:
    """The different values, sorted. numpy.unique makes a hash table first and takes ten times as long."""
    values = np.sort(values)
    return values[_firsts(values)]


def count_sectors(accesses: Accesses, warps: np.ndarray, starts: np.ndarray, width: int) -> np.ndarray:
    """Counts a request of every warp. Returns the touched sectors, once for each request that touched them."""
    shift = np.int64(width.bit_length() - 1)
    granules = _different((warps.astype(np.int64) << 44) | (starts >> shift))
    sectors = granules >> (5 - shift)
    sectors = sectors[_firsts(sectors)]
    owners = sectors >> (39 + shift)
    accesses.requests += 1 + int(np.count_nonzero(owners[1:] != owners[:-1]))
    accesses.sectors += sectors.size
    accesses.used_bytes += granules.size * width
    return sectors & np.int64((1 << (39 + int(shift))) - 1)


def count_banks(accesses: Accesses, lanes: np.ndarray, offsets: np.ndarray, width: int) -> None:
    """Counts a request of every warp: 32 lanes of up to 4 bytes at once, 16 lanes of 8, 8 lanes of 16."""
    words = max(1, width // 4)
    phases = lanes // (32 // words)
    numbers = offsets >> 2
    if words > 1:
        phases = np.repeat(phases, words)
        numbers = (numbers[:, None] + np.arange(words)).reshape(-1)
    keys = _different((phases.astype(np.int64) << 32) | numbers)
    phases = np.cumsum(_firsts(keys >> 32)) - 1
    count = int(phases[-1]) + 1
    per_bank = np.bincount(phases * BANKS + (keys & (BANKS - 1)), minlength=count * BANKS).reshape(count, BANKS)
    accesses.requests += 1 + int(np.count_nonzero(np.diff(lanes >> 5)))
    accesses.wavefronts += int(per_bank.max(1).sum())
    accesses.ideal += count
