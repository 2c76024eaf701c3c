"""What blocks of a launch write for each other through global memory: only what is released and acquired may be read.

The pattern is that of a split sum: a block stores its part, executes a fence and then an atomic; whoever's atomic comes
later may read the part. Blocks are executed in some order here, on a GPU in any, so a missing fence shows no other way.
"""

from __future__ import annotations

import numpy as np

from .memory import Space

__all__ = ["Visibility"]

_NOBODY, _SEVERAL = -1, -2
_GRANULE = 4


class Visibility:
    """Per 4 bytes of global memory: the block that stored them in this launch, and when; time counts fences, atomics.

    Stores of less than 4 bytes are not followed. Atomics are ordered among themselves, and are not followed either.
    """

    def __init__(self, space: Space, blocks: int) -> None:
        self.writer = np.full(space.size // _GRANULE, _NOBODY, np.int32)
        self.write_time = np.zeros(space.size // _GRANULE, np.int32)
        self.low, self.high = space.size, 0
        self.time = 1
        self.fenced = np.zeros(blocks, np.int32)  # stores until then are before the block's last fence
        self.released = np.zeros(blocks, np.int32)  # and that fence before an atomic
        self.release_time = np.full(blocks, np.iinfo(np.int32).max, np.int32)
        self.acquired = np.zeros(blocks, np.int32)  # time of the block's last atomic

    def fence(self, blocks: np.ndarray) -> None:
        self.fenced[blocks] = self.time
        self.time += 1

    def atomic(self, blocks: np.ndarray) -> None:
        """Blocks in the order of their atomics."""
        times = self.time + np.arange(blocks.size, dtype=np.int32)
        self.time += blocks.size
        news = self.fenced[blocks] > self.released[blocks]
        self.released[blocks] = self.fenced[blocks]
        self.release_time[blocks[news]] = times[news]
        self.acquired[blocks] = times

    def _granules(self, starts: np.ndarray, width: int) -> np.ndarray:
        count = max(1, width // _GRANULE)
        return (starts // _GRANULE)[:, None] + np.arange(count)

    def _unordered(self, blocks: np.ndarray, starts: np.ndarray, width: int) -> tuple[int, int] | None:
        """(index, other block) of an access to what another block stored and did not release before it."""
        granules = self._granules(starts, width)
        writer = self.writer[granules]
        foreign = (writer >= 0) & (writer != blocks[:, None])
        if not foreign.any():
            return None
        other = np.where(foreign, writer, 0)
        visible = self.write_time[granules] <= self.released[other]
        visible &= self.release_time[other] <= self.acquired[blocks][:, None]
        bad = np.argwhere(foreign & ~visible)
        return (int(bad[0, 0]), int(writer[tuple(bad[0])])) if bad.size else None

    def _touched(self, starts: np.ndarray) -> bool:
        return self.low < self.high and starts.min() < self.high and starts.max() >= self.low

    def load(self, blocks: np.ndarray, starts: np.ndarray, width: int, constant: bool) -> tuple[int, int] | None:
        """As above; a load of data that is declared constant may not read what this launch stored at all."""
        if not self._touched(starts):
            return None
        if constant:
            stored = np.argwhere(self.writer[self._granules(starts, width)] != _NOBODY)
            if stored.size:
                place = tuple(stored[0])
                return int(place[0]), int(self.writer[self._granules(starts, width)][place])
        return self._unordered(blocks, starts, width)

    def store(self, blocks: np.ndarray, starts: np.ndarray, width: int) -> tuple[int, int] | None:
        found = self._unordered(blocks, starts, width) if self._touched(starts) else None
        granules = self._granules(starts, width)
        self.writer[granules] = blocks[:, None] if width >= _GRANULE else _SEVERAL
        self.write_time[granules] = self.time
        self.low, self.high = min(self.low, int(starts.min())), max(self.high, int(starts.max()) + width)
        return found
