"""Checks global memory that blocks of a launch share: a block may read only stores that were released and acquired.

The pattern is that of a split sum: a block stores its part, executes a fence and then an atomic; whoever's atomic comes
later, and then executes a fence, may read the part. A thread's fence holds for its own stores and for those it has
seen, which are the ones before the last barrier of its block; a barrier also hands on what a thread has acquired.
Blocks are executed in some order here, on a GPU in any, so a missing fence or barrier shows no other way.
"""

from __future__ import annotations

import numpy as np

from .memory import Space

__all__ = ["Visibility"]

_NOBODY, _SEVERAL = -1, -2
_GRANULE = 4


class Visibility:
    """Per 4 bytes of global memory: the warp that stored them in this launch, and when.

    Time counts fences, barriers and atomics; a warp is its number over the grid, and its lanes are taken as one. Stores
    of less than 4 bytes are not followed. Atomics are ordered among themselves, and are not followed either.
    """

    def __init__(self, space: Space, blocks: int, warps: int) -> None:
        self.writer = np.full(space.size // _GRANULE, _NOBODY, np.int32)
        self.write_time = np.zeros(space.size // _GRANULE, np.int32)
        self.low, self.high = space.size, 0
        self.time = 1
        self.warps = warps  # of a block
        self.last_barrier = np.zeros(blocks, np.int32)
        count = blocks * warps
        self.fenced = np.zeros(count, np.int32)  # the warp's stores until then are before its last fence
        self.fenced_others = np.zeros(count, np.int32)  # those of the block's other warps, through a barrier
        self.settled = np.zeros(count, np.int32)  # its stores until then are before a fence before the last barrier
        self.released = np.zeros(count, np.int32)  # and that fence before an atomic of the block
        self.release_time = np.full(count, np.iinfo(np.int32).max, np.int32)
        self.seen = np.zeros(count, np.int32)  # time of the last atomic that it comes after: its own, or by a barrier
        self.acquired = np.zeros(count, np.int32)  # and that a fence came after

    def fence(self, warps: np.ndarray) -> None:
        self.fenced[warps] = self.time
        self.fenced_others[warps] = self.last_barrier[warps // self.warps]
        self.acquired[warps] = self.seen[warps]
        self.time += 1

    def barrier(self, blocks: np.ndarray) -> None:
        """All threads of these blocks passed a barrier."""
        rows = np.arange(self.warps) + blocks[:, None] * self.warps
        fenced = np.maximum(self.fenced[rows], self.fenced_others[rows].max(1, keepdims=True))
        self.settled[rows] = np.maximum(self.settled[rows], fenced)
        for known in (self.seen, self.acquired):
            known[rows] = known[rows].max(1, keepdims=True)
        self.last_barrier[blocks] = self.time
        self.time += 1

    def atomic(self, warps: np.ndarray) -> None:
        """Warps in the order of their atomics."""
        for warp in warps.tolist():
            first = warp // self.warps * self.warps
            block = slice(first, first + self.warps)
            before = np.maximum(self.settled[block], self.fenced_others[warp])
            before[warp - first] = max(before[warp - first], self.fenced[warp])
            news = before > self.released[block]
            self.released[block][news] = before[news]
            self.release_time[block][news] = self.time
            self.seen[warp] = self.time
            self.time += 1

    def acquire(self, warps: np.ndarray) -> None:
        """Atomics that acquire need no fence after them."""
        self.acquired[warps] = self.seen[warps]

    def _granules(self, starts: np.ndarray, width: int) -> np.ndarray:
        count = max(1, width // _GRANULE)
        return (starts // _GRANULE)[:, None] + np.arange(count)

    def _unordered(self, warps: np.ndarray, starts: np.ndarray, width: int) -> tuple[int, int] | None:
        """(index, other warp) of an access to a store of another block that was not released before it."""
        granules = self._granules(starts, width)
        writer = self.writer[granules]
        foreign = (writer >= 0) & (writer // self.warps != (warps // self.warps)[:, None])
        if not foreign.any():
            return None
        other = np.where(foreign, writer, 0)
        visible = self.write_time[granules] <= self.released[other]
        visible &= self.release_time[other] <= self.acquired[warps][:, None]
        bad = np.argwhere(foreign & ~visible)
        return (int(bad[0, 0]), int(writer[tuple(bad[0])])) if bad.size else None

    def _touched(self, starts: np.ndarray) -> bool:
        return self.low < self.high and starts.min() < self.high and starts.max() >= self.low

    def load(self, warps: np.ndarray, starts: np.ndarray, width: int, constant: bool) -> tuple[int, int] | None:
        """The same for reads. A load declared constant may not read any store of this launch."""
        if not self._touched(starts):
            return None
        if constant:
            stored = np.argwhere(self.writer[self._granules(starts, width)] != _NOBODY)
            if stored.size:
                place = tuple(stored[0])
                return int(place[0]), int(self.writer[self._granules(starts, width)][place])
        return self._unordered(warps, starts, width)

    def store(self, warps: np.ndarray, starts: np.ndarray, width: int) -> tuple[int, int] | None:
        found = self._unordered(warps, starts, width) if self._touched(starts) else None
        granules = self._granules(starts, width)
        self.writer[granules] = warps[:, None] if width >= _GRANULE else _SEVERAL
        self.write_time[granules] = self.time
        self.low, self.high = min(self.low, int(starts.min())), max(self.high, int(starts.max()) + width)
        return found
