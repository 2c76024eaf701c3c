"""Executes kernels of PTX: all threads of many blocks at once, as lanes of numpy arrays.

Every instruction is bound once, to a function over the registers (see ``operands.py``). Lanes that are at the same
instruction form a :class:`Group`; of several groups the one with the lowest program counter goes on, and groups that
meet become one again. Barriers hold groups back until the block has arrived.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from . import (  # noqa: F401 (they register what is bound here)
    instructions_bits,
    instructions_compare,
    instructions_convert,
    instructions_float,
    instructions_integer,
    instructions_launch,
    instructions_memory,
    instructions_mma,
    instructions_shared,
    instructions_warp,
)
from .barriers import Barriers
from .counters import BufferTraffic, Counters
from .groups import Group
from .lane_memory import LaneMemory
from .layout import Layout, narrowest_shared
from .memory import EXISTS, WRITABLE, Memory, Space
from .module import Instruction, Kernel, Module, PtxError
from .operands import BINDERS
from .parser import TYPE_BYTES
from .races import Races
from .specials import special_bytes, special_value
from .visibility import Visibility

__all__ = ["Launch", "Machine"]


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched and executed; see :func:`ptx.launch`."""

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int = 0
    races: bool = True
    count_memory: bool = True
    most_issues: int = 50_000_000
    early_buffers: tuple[str, ...] | None = None


class Machine(LaneMemory):
    """Some blocks of a launch while they are executed."""

    def __init__(self, module: Module, kernel: Kernel, memory: Memory, parameters: bytes, launch: Launch) -> None:
        self.module, self.kernel, self.memory, self.parameters, self.launch = module, kernel, memory, parameters, launch
        self.threads = int(np.prod(launch.block))
        self.lanes_per_block = -(-self.threads // 32) * 32
        self.layout = Layout(module, kernel, memory, launch.shared_bytes)
        self.shared_bytes = max(32, -(-self.layout.shared // 32) * 32)  # of one block
        self.local_bytes = -(-self.layout.local // 32) * 32
        self.slots: dict[str, int] = {}
        self.slot_bytes: list[int] = []
        self.specials: list[tuple[int, str]] = []
        self.registers: list[np.ndarray | None] = []
        size = len(kernel.instructions)
        self.issues, self.executions = [0] * size, [0] * size
        self.counters = Counters(kernel, np.zeros(0), np.zeros(0))
        self.sector_requests = np.zeros(memory.space.size // 32, np.int32) if launch.count_memory else None
        warps = self.lanes_per_block // 32
        self.visibility = Visibility(memory.space, int(np.prod(launch.grid)), warps) if launch.races else None
        self.code = [self._bind(place, instruction) for place, instruction in enumerate(kernel.instructions)]

    # Binding.

    def slot(self, name: str) -> int:
        """The index of a register's value. Special registers are registers that nothing writes."""
        if name in self.slots:
            return self.slots[name]
        if name in self.kernel.registers:
            size = TYPE_BYTES[self.kernel.registers[name]]
        elif name.startswith("%") and special_bytes(name):
            size = special_bytes(name)
            self.specials.append((len(self.slot_bytes), name))
        else:
            raise PtxError(f"{name} is neither a register nor a special register that the executor knows")
        self.slots[name] = len(self.slot_bytes)
        self.slot_bytes.append(size)
        self.registers.append(None)
        return self.slots[name]

    def _bind(self, place: int, instruction: Instruction) -> tuple[Instruction | None, Callable | None]:
        """(None, function of the group), or the kind of control flow and the function of its guard."""
        if instruction.base in ("bra", "ret", "exit", "bar", "barrier", "trap", "brkpt"):
            return instruction, self._bind_guard(instruction)
        try:
            if instruction.base not in BINDERS:
                raise PtxError("unknown instruction")
            function = BINDERS[instruction.base](self, instruction)
        except (PtxError, KeyError, ValueError, IndexError, TypeError) as error:
            raise PtxError(
                f"{self.kernel.name}: the executor must know every instruction, got {instruction} ({error!r}); "
                "add it to tools/ptx"
            ) from error
        return None, self._guarded(function, instruction, place)

    def _bind_guard(self, instruction: Instruction) -> Callable | None:
        """A function that gives the lanes of a group for which the guard holds, as a mask; None without a guard."""
        if instruction.guard is None:
            return None
        slot, negated = self.slot(instruction.guard), instruction.negated

        def mask(group: Group) -> np.ndarray:
            values = self.value(slot)
            if group.select is not None:
                values = values[group.select]
            return ~values if negated else values

        return mask

    def _guarded(self, function: Callable, instruction: Instruction, place: int) -> Callable:
        executions = self.executions
        if instruction.guard is None:

            def run_all(group: Group) -> None:
                executions[place] += group.count
                function(group)

            return run_all
        mask_of = self._bind_guard(instruction)

        def run(group: Group) -> None:
            mask = mask_of(group)
            if mask.all():
                executions[place] += group.count
                function(group)
            elif mask.any():
                some = Group(self.total, group.lanes[mask], place)
                executions[place] += some.count
                function(some)
                if some.place != place:
                    # These wait for others of their warps.
                    self.join(group.lanes[~mask], place + 1)
                    group.place = -1

        return run

    def value(self, slot: int) -> np.ndarray:
        """A register's lanes. A register that nothing wrote has arbitrary contents."""
        found = self.registers[slot]
        if found is None:
            size = self.slot_bytes[slot]
            if size == 1:
                found = np.arange(self.total) % 2 == 0
            else:
                # All ones: NaN as a float of any width, so that a value nobody wrote is seen in what it touches.
                found = np.full(self.total, (1 << 8 * size) - 1, f"u{size}")
            self.registers[slot] = found
        return found

    # Execution.

    def start(self, blocks: list[tuple[int, int, int]]) -> None:
        self.blocks = blocks
        self.total = len(blocks) * self.lanes_per_block
        self.block_of_lane = np.repeat(np.arange(len(blocks)), self.lanes_per_block)
        x, y, _ = self.launch.grid
        self.block_numbers = np.array([i + x * (j + y * k) for i, j, k in blocks])
        self.registers[:] = [None] * len(self.registers)
        for slot, name in self.specials:
            self.registers[slot] = special_value(self, name).astype(f"u{self.slot_bytes[slot]}")
        flags = EXISTS | WRITABLE
        self.shared = Space("shared", self.shared_bytes * len(blocks))
        self.shared.shadow.reshape(len(blocks), -1)[:, : self.layout.shared] = flags
        self.shared.data[:] = 0xFF
        self.local = Space("local", max(32, self.local_bytes * self.total))
        self.local.shadow[: self.local_bytes * self.total] = flags
        self.local.data[:] = 0xFF
        self.races = None
        if self.layout.shared and self.launch.races:
            granule = min((narrowest_shared(i) for i in self.kernel.instructions), default=4)
            self.races = Races(len(blocks), self.lanes_per_block, self.shared_bytes, granule)
        self.copies: list = []
        self.commits = np.zeros(self.total, np.int64)
        self.waited = np.zeros(self.total, bool)  # by griddepcontrol.wait
        self.barriers = Barriers(self)
        self.parked: list[Group] = []
        self.exited = np.zeros(self.total, bool)
        lanes = np.arange(self.total)
        if self.threads % 32:
            self.exited = lanes % self.lanes_per_block >= self.threads
            lanes = lanes[~self.exited]
        self.groups = [Group(self.total, lanes, 0)]

    def join(self, lanes: np.ndarray, place: int) -> None:
        """Lanes continue at an instruction, together with the lanes already there."""
        if not lanes.size:
            return
        for index, group in enumerate(self.groups):
            if group.place == place:
                lanes = np.sort(np.concatenate((lanes, group.lanes)))
                del self.groups[index]
                break
        self.groups.append(Group(self.total, lanes, place))

    def run(self) -> None:
        """Executes all blocks to their end."""
        budget = self.launch.most_issues
        while self.groups:
            group = min(self.groups, key=lambda group: group.place)
            self.groups.remove(group)
            budget -= self._advance(group, min((other.place for other in self.groups), default=len(self.code)))
            if budget < 0:
                raise PtxError(
                    f"{self.kernel.name}: at most {self.launch.most_issues} instructions, and more were executed, the "
                    f"last at {self.kernel.instructions[group.place]}; an endless loop?"
                )
        self._require_finished()

    def _advance(self, group: Group, limit: int) -> int:
        """Executes a group until it branches, waits, ends or reaches `limit`. Returns the number of instructions."""
        code, issues = self.code, self.issues
        start = place = group.place
        while place < limit:
            control, function = code[place]
            issues[place] += group.warps
            group.place = place
            if control is None:
                function(group)
                if group.place != place:
                    return place - start + 1
            elif not self._control(control, group, function):
                return place - start + 1
            place += 1
        if place == len(code):
            raise PtxError(f"{self.kernel.name}: a kernel must end with ret, got past its last instruction")
        self.join_group(group, place)
        return place - start

    def _control(self, instruction: Instruction, group: Group, mask_of: Callable | None) -> bool:
        """Whether the whole group continues with the next instruction. If not, its lanes have been sent elsewhere."""
        place = group.place
        mask = None if mask_of is None else mask_of(group)
        if mask is not None and not mask.any():
            return True
        if mask is not None and not mask.all():
            self.join(group.lanes[~mask], place + 1)
            group = Group(self.total, group.lanes[mask], place)
        self.executions[place] += group.count
        if instruction.base == "bra":
            self.join_group(group, instruction.target)
        elif instruction.base in ("ret", "exit"):
            self.exited[group.lanes] = True
        elif instruction.base in ("bar", "barrier"):
            self.barriers.execute(group, instruction)
        else:
            raise self.fault(group, int(group.lanes[0]), "a trap was executed")
        return False

    def join_group(self, group: Group, place: int) -> None:
        if any(other.place == place for other in self.groups):
            self.join(group.lanes, place)
        else:
            group.place = place
            self.groups.append(group)

    def park(self, group: Group, missing: np.ndarray) -> None:
        """A warp-wide instruction waits for lanes that its mask names and that are elsewhere.

        missing: bool per lane of the group, for warps that wait. The others go on by themselves.
        """
        place = group.place
        self._not_yet(group)
        self.parked.append(Group(self.total, group.lanes[missing], place))
        self.join(group.lanes[~missing], place)
        group.place = -1

    def _not_yet(self, group: Group) -> None:
        """The group has not executed this instruction and returns to it."""
        self.issues[group.place] -= group.warps
        self.executions[group.place] -= group.count

    def unpark(self, place: int) -> np.ndarray:
        """Releases and returns the lanes that wait at a warp-wide instruction."""
        found = [group.lanes for group in self.parked if group.place == place]
        self.parked = [group for group in self.parked if group.place != place]
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def _require_finished(self) -> None:
        for group in self.parked:
            lane = int(group.lanes[0])
            raise PtxError(
                f"{self.kernel.name}: all lanes that the mask names must execute it, got only some of them at "
                f"{self.kernel.instructions[group.place]} ({self.describe_lane(lane)} waits there)"
            )
        self.barriers.require_none()
        for copy in self.copies:
            if copy.pending.any():
                raise PtxError(
                    f"{self.kernel.name}: a cp.async must be waited for, got {int(copy.pending.sum())} lanes of "
                    f"{copy.instruction} that exited without; add cp.async.wait_all"
                )

    def warp_wide(self, group: Group, mask: np.ndarray) -> bool:
        """Whether every lane that a lane's `mask` names is in the group. If not, these warps wait."""
        if group.whole_warps and np.all(mask == np.uint32(0xFFFFFFFF)):
            return True
        mask = np.broadcast_to(np.asarray(mask, np.uint32), (group.count,))
        here = np.zeros(self.total, bool)
        here[group.lanes] = True
        waiting = self.unpark(group.place)
        if waiting.size:
            # Those that came before: all of them together try again.
            self._not_yet(group)
            self.join(np.sort(np.concatenate((waiting, group.lanes))), group.place)
            group.place = -1
            return False
        bits = (
            np.packbits(here.reshape(-1, 32), axis=1, bitorder="little").view(np.uint32).reshape(-1)[group.lanes >> 5]
        )
        own = np.uint32(1) << (group.lanes & 31).astype(np.uint32)
        if (mask & own == 0).any():
            lane = int(group.lanes[np.flatnonzero(mask & own == 0)[0]])
            raise self.fault(group, lane, "a lane must be in the mask of the instruction that it executes")
        missing = mask & ~bits
        if not missing.any():
            return True
        gone = np.packbits(self.exited.reshape(-1, 32), axis=1, bitorder="little").view(np.uint32).reshape(-1)
        if (missing & gone[group.lanes >> 5]).any():
            lane = int(group.lanes[np.flatnonzero(missing & gone[group.lanes >> 5])[0]])
            raise self.fault(group, lane, "the mask names lanes that have exited or do not exist")
        warps = np.unique(group.lanes[missing != 0] >> 5)
        self.park(group, np.isin(group.lanes >> 5, warps))
        return False

    # Errors.

    def describe_lane(self, lane: int) -> str:
        block = self.blocks[lane // self.lanes_per_block]
        thread = lane % self.lanes_per_block
        x, y, _ = self.launch.block
        return f"thread ({thread % x}, {thread // x % y}, {thread // (x * y)}) of block {block}"

    def fault(self, group: Group, lane: int, what: str) -> PtxError:
        instruction = self.kernel.instructions[group.place]
        return PtxError(f"{self.kernel.name}: {what}; {instruction}; {self.describe_lane(lane)}")

    def finish(self) -> Counters:
        counters = self.counters
        counters.per_instruction = np.array(self.issues, np.int64)
        counters.lanes = np.array(self.executions, np.int64)
        if self.sector_requests is not None:
            for buffer in self.memory.buffers:
                requests = self.sector_requests[buffer.start // 32 : -(-(buffer.start + buffer.size) // 32)]
                if requests.any():
                    counters.buffers[buffer.name] = BufferTraffic(
                        int(requests.sum(dtype=np.int64)),
                        int(np.count_nonzero(requests)),
                        buffer.read_bytes,
                        int(requests.max()),
                    )
        return counters
