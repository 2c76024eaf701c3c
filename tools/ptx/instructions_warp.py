"""Instructions of a whole warp: shuffles, votes, reductions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .groups import Group
from .module import Instruction, PtxError
from .operands import DTYPES, binds, source, target

U32 = np.uint32


def _shuffle_sources(mode: str, lane: np.ndarray, b: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(lane of the warp that each lane reads, whether it is inside the segment)."""
    b, clamp, segment = b & 31, c & 31, c >> 8 & 31
    highest = (lane & segment) | (clamp & ~segment)
    if mode == "up":
        other = lane - b
        inside = other >= highest
    elif mode == "down":
        other = lane + b
        inside = other <= highest
    elif mode == "bfly":
        other = lane ^ b
        inside = other <= highest
    else:
        other = (lane & segment) | (b & ~segment)
        inside = other <= highest
    return np.where(inside, other, lane), inside


@binds("shfl")
def _shfl(machine, instruction: Instruction) -> Callable:
    sync, mode, name = instruction.modifiers
    if sync != "sync" or mode not in ("up", "down", "bfly", "idx") or name != "b32":
        raise PtxError("unknown form")
    results, *operands = instruction.operands
    results = results if isinstance(results, tuple) else (results, "_")
    put, put_inside = target(machine, results[0], "b32"), target(machine, results[1], "pred")
    value, *others = [source(machine, operand, "b32") for operand in operands]

    def run(group: Group) -> None:
        b, c, mask = (get(group) for get in others)
        if not machine.warp_wide(group, mask):
            return
        a = np.broadcast_to(value(group), (group.count,))
        lane = group.lanes & 31
        other, inside = _shuffle_sources(mode, lane, np.asarray(b).astype(np.int64), np.asarray(c).astype(np.int64))
        # The bfly of lane 31 with 32 and more wraps by the mask of b; up and down stay inside.
        wanted = (group.lanes & ~31) | (other & 31)
        if group.select is None and machine.total == group.count:
            places = wanted
        else:
            places = np.minimum(np.searchsorted(group.lanes, wanted), group.count - 1)
            absent = group.lanes[places] != wanted
            if absent.any():
                lane = int(group.lanes[np.flatnonzero(absent)[0]])
                raise machine.fault(group, lane, "a shuffle reads a lane that does not execute it")
        put(group, a[places])
        if results[1] != "_":
            put_inside(group, np.array(np.broadcast_to(inside, (group.count,))))

    return run


def _warps(group: Group) -> tuple[np.ndarray, int]:
    """For each lane the index of its warp in the group, and the number of warps."""
    numbers = group.lanes >> 5
    return np.concatenate(([0], np.cumsum(numbers[1:] != numbers[:-1]))), group.warps


def _bits(group: Group, flags: np.ndarray) -> np.ndarray:
    """Per lane: the mask of the lanes of its warp whose flag is set."""
    warp, count = _warps(group)
    masks = np.bincount(warp, weights=flags * np.exp2(group.lanes & 31), minlength=count)
    return masks.astype(np.uint64).astype(U32)[warp]


@binds("activemask")
def _activemask(machine, instruction: Instruction) -> Callable:
    put = target(machine, instruction.operands[0], "b32")
    return lambda group: put(group, _bits(group, np.ones(group.count)))


@binds("vote")
def _vote(machine, instruction: Instruction) -> Callable:
    sync, mode, name = instruction.modifiers
    if sync != "sync" or (mode, name) not in (("ballot", "b32"), ("all", "pred"), ("any", "pred"), ("uni", "pred")):
        raise PtxError("unknown form")
    put = target(machine, instruction.operands[0], name)
    flag, members = source(machine, instruction.operands[1], "pred"), source(machine, instruction.operands[2], "b32")

    def run(group: Group) -> None:
        mask = members(group)
        if not machine.warp_wide(group, mask):
            return
        ballot = _bits(group, np.broadcast_to(flag(group), (group.count,))) & mask
        if mode == "ballot":
            put(group, ballot)
        elif mode == "any":
            put(group, ballot != 0)
        elif mode == "all":
            put(group, ballot == mask)
        else:
            put(group, (ballot == mask) | (ballot == 0))

    return run


@binds("elect")
def _elect(machine, instruction: Instruction) -> Callable:
    lane, predicate = instruction.operands[0]
    put, put_elected = target(machine, lane, "b32"), target(machine, predicate, "pred")
    members = source(machine, instruction.operands[1], "b32")

    def run(group: Group) -> None:
        mask = np.broadcast_to(members(group), (group.count,))
        if not machine.warp_wide(group, mask):
            return
        leader = np.bitwise_count((mask & (~mask + U32(1))) - U32(1)).astype(U32)
        put(group, leader)
        put_elected(group, leader == (group.lanes & 31))

    return run


@binds("match")
def _match(machine, instruction: Instruction) -> Callable:
    mode, sync, name = instruction.modifiers
    if sync != "sync" or mode not in ("any", "all") or name not in ("b32", "b64"):
        raise PtxError("unknown form")
    result, operand, mask_operand = instruction.operands
    result, predicate = result if isinstance(result, tuple) else (result, "_")
    put, put_all = target(machine, result, "b32"), target(machine, predicate, "pred")
    get, members = source(machine, operand, name), source(machine, mask_operand, "b32")

    def run(group: Group) -> None:
        mask = np.broadcast_to(members(group), (group.count,))
        if not machine.warp_wide(group, mask):
            return
        values = np.broadcast_to(get(group), (group.count,))
        warp, _ = _warps(group)
        same = (values[:, None] == values[None, :]) & (warp[:, None] == warp[None, :])
        found = (same * (U32(1) << (group.lanes & 31).astype(U32))).sum(1).astype(U32) & mask
        if mode == "all":
            found = np.where(found == mask, mask, U32(0))
            put_all(group, found == mask)
        put(group, found)

    return run


_REDUCTIONS = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


@binds("redux")
def _redux(machine, instruction: Instruction) -> Callable:
    sync, operation, *words, name = instruction.modifiers
    if sync != "sync" or words or name not in ("u32", "s32", "b32"):
        raise PtxError("unknown form")
    put = target(machine, instruction.operands[0], name)
    get, members = source(machine, instruction.operands[1], name), source(machine, instruction.operands[2], "b32")
    reduce = _REDUCTIONS[operation]

    def run(group: Group) -> None:
        mask = members(group)
        if not machine.warp_wide(group, mask):
            return
        values = np.broadcast_to(get(group), (group.count,))
        if group.whole_warps and np.all(mask == U32(0xFFFFFFFF)):
            rows = values.reshape(-1, 32)
            total = reduce.reduce(rows, axis=1, dtype=DTYPES[name])
            put(group, np.repeat(total, 32))
            return
        keys = (group.lanes >> 5 << 32) | np.broadcast_to(mask, (group.count,)).astype(np.int64)
        result = np.empty(group.count, DTYPES[name])
        for key in np.unique(keys):
            result[keys == key] = reduce.reduce(values[keys == key], dtype=DTYPES[name])
        put(group, result)

    return run
