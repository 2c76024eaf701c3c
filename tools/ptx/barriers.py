"""Barriers of blocks: bar.sync, bar.arrive, bar.red, of all threads or of some, and bar.warp.sync."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from .groups import Group
from .module import Instruction, PtxError
from .operands import source, target

__all__ = ["Barriers"]


@dataclass
class _Waiting:
    """Lanes at a barrier and their next instruction. With a reduction also its target and their contributions."""

    lanes: np.ndarray
    place: int
    operation: str = ""
    put: Callable | None = None
    values: np.ndarray | None = None


@dataclass
class _Barrier:
    """A barrier that has not been passed yet."""

    count: int = 0
    arrived: list[int] = field(default_factory=list)  # warps, of bar.arrive
    waiting: list[_Waiting] = field(default_factory=list)


class Barriers:
    """The barriers of a machine, by block and number."""

    def __init__(self, machine) -> None:
        self.machine = machine
        self.pending: dict[tuple[int, int], _Barrier] = {}

    def execute(self, group: Group, instruction: Instruction) -> None:
        """Lanes arrive at a barrier. They wait, continue, or release all waiting lanes."""
        machine, place = self.machine, group.place
        kind, *words = [word for word in instruction.modifiers if word not in ("cta", "aligned")]
        operands = list(instruction.operands)
        if kind == "warp":
            if machine.warp_wide(group, source(machine, operands[0], "b32")(group)):
                if machine.races:
                    machine.races.warp_sync(np.unique(group.lanes >> 5))
                machine.join(group.lanes, place + 1)
            return
        waiting = _Waiting(group.lanes, place + 1)
        if kind == "red":
            waiting.operation, waiting.put = words[0], target(machine, operands.pop(0), words[1])
            waiting.values = source(machine, operands.pop(), "pred")(group)
        elif kind not in ("sync", "arrive") or words:
            raise PtxError(f"{machine.kernel.name}: the executor must know every instruction, got {instruction}")
        number = self._uniform(operands[0], group, instruction)
        needed = self._uniform(operands[1], group, instruction) if len(operands) > 1 else machine.threads
        if group.select is None and needed == machine.threads and kind == "sync" and not self.pending:
            self._passed(np.arange(len(machine.blocks)))
            machine.join(group.lanes, place + 1)
            return
        edges = np.flatnonzero(np.diff(machine.block_of_lane[group.lanes])) + 1
        values = [None] * (edges.size + 1) if waiting.values is None else np.split(waiting.values, edges)
        for lanes, some in zip(np.split(group.lanes, edges), values, strict=True):
            block = int(machine.block_of_lane[lanes[0]])
            barrier = self.pending.setdefault((block, number), _Barrier())
            barrier.count += lanes.size
            if kind == "arrive":
                barrier.arrived += (np.unique(lanes >> 5) - block * machine.lanes_per_block // 32).tolist()
                machine.join(lanes, place + 1)
            else:
                barrier.waiting.append(_Waiting(lanes, place + 1, waiting.operation, waiting.put, some))
            if barrier.count >= needed:
                del self.pending[block, number]
                self._release(block, barrier, needed, instruction)

    def _release(self, block: int, barrier: _Barrier, needed: int, instruction: Instruction) -> None:
        machine = self.machine
        if barrier.count > needed:
            raise PtxError(
                f"{machine.kernel.name}: {needed} threads take part in a barrier, got {barrier.count} at {instruction}"
            )
        if needed == machine.threads and not barrier.arrived:
            self._passed(np.array([block]))
        else:
            machine.counters.barriers += 1
            if machine.races:
                first = block * machine.lanes_per_block // 32
                waited = sorted({warp - first for waiting in barrier.waiting for warp in (waiting.lanes >> 5).tolist()})
                machine.races.partial_barrier(block, sorted(set(barrier.arrived) - set(waited)), waited)
            self._seen(np.array([block]))
        reductions = [waiting for waiting in barrier.waiting if waiting.put]
        for waiting in reductions:
            values = np.concatenate([other.values for other in reductions])
            value = {"popc": np.count_nonzero, "and": np.all, "or": np.any}[waiting.operation](values)
            dtype = np.uint32 if waiting.operation == "popc" else bool
            group = Group(machine.total, waiting.lanes, waiting.place)
            waiting.put(group, np.full(waiting.lanes.size, value, dtype))
        for waiting in barrier.waiting:
            machine.join(waiting.lanes, waiting.place)

    def _passed(self, blocks: np.ndarray) -> None:
        """All threads of these blocks passed a barrier."""
        self.machine.counters.barriers += blocks.size
        if self.machine.races:
            self.machine.races.barrier(blocks)
        self._seen(blocks)

    def _seen(self, blocks: np.ndarray) -> None:
        """A barrier passes on the stores and acquisitions of its threads. One of some threads counts as a full one."""
        if self.machine.visibility:
            self.machine.visibility.barrier(np.asarray(self.machine.block_numbers)[blocks])

    def _uniform(self, operand, group: Group, instruction: Instruction) -> int:
        values = np.atleast_1d(source(self.machine, operand, "u32")(group))
        if (values != values[0]).any():
            raise PtxError(
                f"{self.machine.kernel.name}: lanes must name the same barrier, got several at {instruction}"
            )
        return int(values[0])

    def require_none(self) -> None:
        """Checks at the end of a kernel that no lane waits."""
        machine = self.machine
        for (block, number), barrier in self.pending.items():
            places = sorted({waiting.place - 1 for waiting in barrier.waiting})
            where = "; ".join(str(machine.kernel.instructions[place]) for place in places)
            raise PtxError(
                f"{machine.kernel.name}: all threads of a block must arrive at a barrier, got {barrier.count} at "
                f"barrier {number} of block {machine.blocks[block]} ({where}) and the others exited or wait elsewhere"
            )
