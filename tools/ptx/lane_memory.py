"""Loads and stores by lanes: their checks and counts."""

from __future__ import annotations

import numpy as np

from .counters import Accesses, Counters, count_banks, count_sectors
from .groups import Group
from .layout import Layout
from .memory import GLOBAL_BASE, Memory, Space
from .module import PtxError
from .races import Races
from .visibility import Visibility

__all__ = ["LaneMemory"]


class LaneMemory:
    """The memory of a machine. Addresses are uint64 within their space."""

    memory: Memory
    layout: Layout
    shared: Space
    local: Space
    counters: Counters
    races: Races | None
    visibility: Visibility | None
    waited: np.ndarray  # by griddepcontrol.wait, per lane

    def access_fault(self, group: Group, space: Space, addresses: np.ndarray, width: int, store: bool) -> PtxError:
        """The reason why the group's lanes may not access these addresses of their space."""
        base = GLOBAL_BASE if space is self.memory.space else 0
        room = self.memory.space.size
        if space is self.shared:
            room = self.layout.shared
        elif space is self.local:
            room = self.layout.local
        for lane, address in zip(group.lanes.tolist(), addresses.tolist(), strict=True):
            start = address - base
            if start % width:
                what = f"an address misaligned for {width} bytes"
            elif not 0 <= start <= room - width:
                what = "out of bounds"
            else:
                if space is self.shared:
                    start += lane // self.lanes_per_block * self.shared_bytes
                elif space is self.local:
                    start += lane * self.local_bytes
                what = space.complaint(start, width, store)
            if what:
                where = f"{space.name} address {address:#x}"
                if space is self.memory.space:
                    where += f", {self.memory.nearest(address)}"
                else:
                    where += f", of {room} bytes"
                return self.fault(group, lane, f"{'store' if store else 'load'} of {width} bytes: {what} at {where}")
        return self.fault(group, int(group.lanes[0]), "an access that its space does not allow")

    def race_fault(self, group: Group, found: tuple[int, int, str], offsets: np.ndarray, does: str) -> PtxError:
        index, other, did = found
        return self.fault(
            group,
            int(group.lanes[index]),
            f"a race in shared memory: {does} byte {int(offsets[index])} that {self.describe_lane(other)} {did} with "
            "no barrier between",
        )

    def places(self, group: Group, space: Space, addresses: np.ndarray, width: int, store: bool) -> np.ndarray:
        """Indices into the space's view of that width; addresses are uint64, of the space."""
        if space is self.memory.space:
            offsets = addresses - np.uint64(GLOBAL_BASE)
            room = space.size
        else:
            offsets = addresses
            room = self.layout.shared if space is self.shared else self.layout.local
        if room < width or offsets.max() > room - width or np.bitwise_or.reduce(offsets) & np.uint64(width - 1):
            raise self.access_fault(group, space, addresses, width, store)
        offsets = offsets.view(np.int64)
        if space is self.memory.space and self.launch.early_buffers is not None:
            self._check_early(group, offsets, store)
        if space is self.shared:
            offsets = offsets + self.block_of_lane[group.lanes] * self.shared_bytes
        elif space is self.local:
            offsets = offsets + group.lanes * self.local_bytes
        return offsets >> (width.bit_length() - 1)

    def _check_early(self, group: Group, offsets: np.ndarray, store: bool) -> None:
        """A launch that began early may only load, and only from the named buffers, before griddepcontrol.wait."""
        early = ~self.waited[group.lanes]
        if not early.any():
            return
        for buffer in self.memory.buffers:
            if not store and buffer.name in self.launch.early_buffers:
                early &= (offsets < buffer.start) | (offsets >= buffer.start + buffer.size)
        if early.any():
            index = int(np.argmax(early))
            where = self.memory.nearest(int(offsets[index]) + GLOBAL_BASE)
            what = "stores to" if store else "loads"
            raise self.fault(group, int(group.lanes[index]), f"{what} {where} before griddepcontrol.wait")

    def number_warps(self, group: Group) -> np.ndarray:
        """Each lane's warp, numbered over the grid."""
        block = self.block_of_lane[group.lanes]
        return (group.lanes >> 5) + (self.block_numbers[block] - block) * (self.lanes_per_block // 32)

    def _visibility_fault(self, group: Group, found: tuple[int, int], addresses: np.ndarray, what: str) -> PtxError:
        index, other = found[0], found[1] // (self.lanes_per_block // 32)
        where = self.memory.nearest(int(addresses[index]))
        return self.fault(
            group,
            int(group.lanes[index]),
            f"a race in global memory: {what} {where}, that block number {other} stored with no fence, "
            "atomic and fence between",
        )

    def load(self, group: Group, space: Space, addresses: np.ndarray, width: int, constant: bool = False) -> np.ndarray:
        places = self.places(group, space, addresses, width, False)
        if space is self.memory.space and self.visibility:
            found = self.visibility.load(self.number_warps(group), places * width, width, constant)
            if found:
                raise self._visibility_fault(group, found, addresses, "loads (as constant)" if constant else "loads")
        if space is self.shared and self.races:
            found = self.races.read(group.lanes, places * width, width)
            if found:
                # Pending copies are reported first.
                if space.load(places, width, False) is None:
                    raise self.access_fault(group, space, addresses, width, False)
                raise self.race_fault(group, found, addresses, "reads")
        values = space.load(places, width, space is self.memory.space)
        if values is None:
            raise self.access_fault(group, space, addresses, width, False)
        if self.launch.count_memory:
            self._count(group, space, addresses, places, width, False)
        return values

    def store(self, group: Group, space: Space, addresses: np.ndarray, width: int, values: np.ndarray) -> None:
        places = self.places(group, space, addresses, width, True)
        if space is self.shared and self.races:
            found = self.races.write(group.lanes, places * width, width, values)
            if found:
                raise self.race_fault(group, found, addresses, "writes")
        if not space.store(places, width, values):
            raise self.access_fault(group, space, addresses, width, True)
        if space is self.memory.space and self.visibility:
            found = self.visibility.store(self.number_warps(group), places * width, width)
            if found:
                raise self._visibility_fault(group, found, addresses, "stores to")
            differ = space.views[width][places] != values
            if differ.any():
                lane = int(group.lanes[np.argwhere(differ)[0, 0]])
                raise self.fault(group, lane, "two lanes store different values to one address in one instruction")
        if self.launch.count_memory:
            self._count(group, space, addresses, places, width, True)

    def count_copy(self, group: Group, targets: np.ndarray, width: int) -> None:
        """The shared memory side of a cp.async."""
        if self.launch.count_memory:
            accesses = self.counters.shared.setdefault(group.place, Accesses())
            count_banks(accesses, group.lanes, targets.view(np.int64), width)

    def _count(self, group, space, addresses, places, width: int, store: bool) -> None:
        if space is self.memory.space:
            table = self.counters.global_stores if store else self.counters.global_loads
            accesses = table.setdefault(group.place, Accesses())
            sectors = count_sectors(accesses, group.lanes >> 5, places * width, width)
            if not store:
                np.add.at(self.sector_requests, sectors, 1)
        elif space is self.shared:
            accesses = self.counters.shared.setdefault(group.place, Accesses())
            count_banks(accesses, group.lanes, addresses.view(np.int64), width)
        else:
            self.counters.uses_local_memory = True
