"""Finds accesses to shared memory that no barrier orders, whatever the order of execution."""

from __future__ import annotations

import numpy as np

__all__ = ["Races"]


class Races:
    """Per granule of shared memory: who wrote it last, who has read it since, and when.

    Time is the number of barriers executed. Two accesses by one thread are in order. Those of two lanes of a warp
    are if a bar.warp.sync or a barrier is between them, those of two warps if a barrier is: `after[block][w, v]` is the
    time until when the accesses of warp v came before what warp w does now. (A shuffle orders no memory accesses.)
    """

    def __init__(self, blocks: int, lanes_per_block: int, bytes_per_block: int, granule: int) -> None:
        count = blocks * bytes_per_block // granule
        warps = lanes_per_block // 32
        self.granule, self.lanes_per_block = granule, lanes_per_block
        self.writer = np.full(count, -1, np.int32)
        self.write_time = np.zeros(count, np.int32)
        self.reader = np.full(count, -1, np.int32)  # -2: several
        self.read_time = np.zeros(count, np.int32)
        self.reading_warps = np.zeros(count, np.uint64)
        self.time = 1
        self.last_barrier = np.zeros(blocks, np.int32)  # of all threads
        self.last_warp_sync = np.zeros(blocks * warps, np.int32)
        self.after: dict[int, np.ndarray] = {}
        self.warps = warps

    def barrier(self, blocks: np.ndarray) -> None:
        """All threads of these blocks passed a barrier."""
        for block in self.after.keys() & set(blocks.tolist()):
            self.after[block][:] = self.time
        self.time += 1
        self.last_barrier[blocks] = self.time
        self.last_warp_sync.reshape(-1, self.warps)[blocks] = self.time

    def partial_barrier(self, block: int, arrived: list[int], waited: list[int]) -> None:
        """A barrier of some warps of a block: warps that only arrived, and warps that waited for all of them."""
        if block not in self.after:
            self.after[block] = np.full((self.warps, self.warps), self.last_barrier[block] - 1, np.int32)
        after = self.after[block]
        everyone = arrived + waited
        joined = after[everyone].max(0)
        joined[everyone] = self.time
        for warp in waited:
            after[warp] = np.maximum(after[warp], joined)
        self.time += 1
        self.last_warp_sync[block * self.warps + np.array(everyone)] = self.time

    def warp_sync(self, warps: np.ndarray) -> None:
        self.time += 1
        self.last_warp_sync[warps] = self.time

    def _unordered(self, lanes: np.ndarray, other: np.ndarray, time: np.ndarray) -> np.ndarray:
        """Places where the access of lane `other` (-1 none) at `time` is not ordered before what `lanes` do now."""
        recent = time >= self.last_barrier[lanes // self.lanes_per_block]
        suspect = np.flatnonzero((other >= 0) & (other != lanes) & recent)
        if not suspect.size:
            return suspect
        lanes, other, time = lanes[suspect], other[suspect], time[suspect]
        same = lanes >> 5 == other >> 5
        bad = np.where(same, time >= self.last_warp_sync[lanes >> 5], True)
        return suspect[bad & ~(~same & self._ordered_by_part(lanes, other >> 5, time))]

    def _ordered_by_part(self, lanes: np.ndarray, warps: np.ndarray, time: np.ndarray) -> np.ndarray:
        """Whether barriers of parts of a block order the accesses of `warps` at `time` before what `lanes` do now."""
        ordered = np.zeros(lanes.size, bool)
        for block, after in self.after.items():
            here = np.flatnonzero(lanes // self.lanes_per_block == block)
            first = block * self.warps
            ordered[here] = after[(lanes[here] >> 5) - first, warps[here] - first] >= time[here]
        return ordered

    def _spread(self, lanes: np.ndarray, starts: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
        count = width // self.granule
        places = starts // self.granule
        if count == 1:
            return lanes, places
        return np.repeat(lanes, count), (places[:, None] + np.arange(count)).reshape(-1)

    def read(self, lanes: np.ndarray, starts: np.ndarray, width: int) -> tuple[int, int, str] | None:
        """Lanes read `width` bytes at `starts`. The first conflict as (index into lanes, other lane, what), or None."""
        lanes, places = self._spread(lanes, starts, width)
        bad = self._unordered(lanes, self.writer[places], self.write_time[places])
        if bad.size:
            first = int(bad[0])
            return first * self.granule // width, int(self.writer[places[first]]), "wrote"
        readers = self.reader[places]
        warp_bits = np.uint64(1) << (lanes % self.lanes_per_block >> 5).astype(np.uint64)
        # An access ordered after this one is also ordered after the reads before it: those need not be remembered.
        old_bits, old_time = self.reading_warps[places], self.read_time[places]
        keep = (readers != -1) & (readers != lanes) & (old_time >= self.last_barrier[lanes // self.lanes_per_block])
        keep &= (old_bits != warp_bits) | (old_time >= self.last_warp_sync[lanes >> 5])
        bits = np.where(keep, old_bits, np.uint64(0)) | warp_bits
        self.reader[places] = np.where(keep, np.int32(-2), lanes.astype(np.int32))
        self.reading_warps[places] = bits
        self.read_time[places] = self.time
        lost = np.flatnonzero((self.reader[places] != lanes) | (self.reading_warps[places] != bits))
        if lost.size:
            np.bitwise_or.at(self.reading_warps, places[lost], bits[lost])
            self.reader[places[lost]] = -2
        return None

    def write(
        self, lanes: np.ndarray, starts: np.ndarray, width: int, values: np.ndarray | None = None
    ) -> tuple[int, int, str] | None:
        """Lanes write. In one instruction several may write the same value to the same place, as Triton has them do."""
        whole, first_places = lanes, starts // self.granule
        lanes, places = self._spread(lanes, starts, width)
        for others, times, what in (
            (self.writer[places], self.write_time[places], "wrote"),
            (self.reader[places], self.read_time[places], "read"),
        ):
            bad = self._unordered(lanes, others, times)
            if bad.size:
                return int(bad[0]) * self.granule // width, int(others[bad[0]]), what
        time = self.read_time[places]
        several = np.flatnonzero(
            (self.reader[places] == -2) & (time >= self.last_barrier[lanes // self.lanes_per_block])
        )
        if several.size:
            mine = np.uint64(1) << (lanes[several] % self.lanes_per_block >> 5).astype(np.uint64)
            in_warp = (self.reading_warps[places[several]] == mine) & (
                time[several] < self.last_warp_sync[lanes[several] >> 5]
            )
            several = several[~in_warp]
        for place in several.tolist():
            other = self._several_readers(int(lanes[place]), int(places[place]))
            if other is not None:
                return place * self.granule // width, other, "read"
        self.writer[places] = lanes
        self.write_time[places] = self.time
        self.reader[places] = -1
        lost = np.flatnonzero(self.writer[first_places] != whole)
        for place in lost.tolist():
            other = int(self.writer[first_places[place]])
            winner = np.flatnonzero((whole == other) & (starts == starts[place]))
            same = winner.size and values is not None and np.array_equal(values[winner[-1]], values[place])
            if not same:
                return place, other, "writes, in the same instruction,"
        return None

    def _several_readers(self, lane: int, place: int) -> int | None:
        """A lane whose read of a place that several lanes read is not ordered before what `lane` does now."""
        block, time = lane // self.lanes_per_block, self.read_time[place]
        bits = int(self.reading_warps[place])
        for warp in range(self.warps):
            if not bits >> warp & 1:
                continue
            full = block * self.warps + warp
            if full == lane >> 5:
                ordered = time < self.last_warp_sync[full]
            else:
                ordered = block in self.after and self.after[block][(lane >> 5) - block * self.warps, warp] >= time
            if not ordered:
                return full * 32
        return None
