"""Lanes that execute together."""

from __future__ import annotations

import numpy as np

__all__ = ["Group"]


class Group:
    """Lanes at one instruction, ascending. `select` indexes registers: None for all lanes of the machine.

    `place` is the instruction, -1 once an instruction has sent the lanes elsewhere itself.
    """

    __slots__ = ("count", "lanes", "place", "select", "warps", "whole_warps")

    def __init__(self, total: int, lanes: np.ndarray, place: int) -> None:
        self.lanes = lanes
        self.place = place
        self.count = count = lanes.size
        numbers = lanes >> 5
        self.warps = int(np.count_nonzero(numbers[1:] != numbers[:-1])) + 1 if count else 0
        self.whole_warps = count == 32 * self.warps
        self.select: slice | np.ndarray | None
        if count == total:
            self.select = None
        elif count and lanes[-1] - lanes[0] + 1 == count:
            self.select = slice(int(lanes[0]), int(lanes[-1]) + 1)
        else:
            self.select = lanes
