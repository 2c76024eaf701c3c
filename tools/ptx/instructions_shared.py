"""Ways into and out of shared memory: asynchronous copies, rows of matrices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .groups import Group
from .memory import GLOBAL_BASE, IN_FLIGHT, SHARED_WINDOW, WRITTEN
from .module import Instruction, PtxError
from .operands import address, binds, require, source, target


@dataclass
class Copy:
    """One execution of cp.async: its bytes and their place, which arrive once its group has been waited for."""

    instruction: Instruction
    lanes: np.ndarray
    places: np.ndarray
    values: np.ndarray
    width: int
    numbers: np.ndarray  # of the groups, per lane
    pending: np.ndarray


@binds("cp")
def _cp(machine, instruction: Instruction) -> Callable:
    words = instruction.modifiers
    if words[:1] != ("async",):
        raise PtxError("unknown instruction")
    if words[1:] == ("commit_group",):

        def commit(group: Group) -> None:
            machine.commits[group.lanes] += 1

        return commit
    if words[1:] == ("wait_all",):
        return lambda group: wait(machine, group, None)
    if words[1:] == ("wait_group",):
        count = instruction.operands[0].value
        return lambda group: wait(machine, group, count)
    require(
        instruction,
        (
            "ca",
            "cg",
            "shared:cta",
            "shared:cluster",
            "shared",
            "global",
            "L2:64B",
            "L2:128B",
            "L2:256B",
            "L2:cache_hint",
        ),
        words[1:],
    )
    destination, origin, size, *rest = instruction.operands
    width = size.value
    if width not in ((16,) if "cg" in words else (4, 8, 16)):
        raise PtxError(f"cp.async cannot copy {width} bytes")
    to, from_ = address(machine, destination, "shared"), address(machine, origin, "global")
    given = source(machine, rest[0], "u32") if rest and "L2:cache_hint" not in words else None
    if "L2:cache_hint" in words and len(rest) > 1:
        given = source(machine, rest[0], "u32")
    if rest and isinstance(rest[0], str) and machine.kernel.registers.get(rest[0]) == "pred":
        raise PtxError("unknown form: ignore-src")

    def run(group: Group) -> None:
        targets = to(group)
        places = machine.places(group, machine.shared, targets, width, True)
        shadow = machine.shared.shadow.reshape(-1, width)
        if (shadow[places] & IN_FLIGHT).any():
            raise machine.access_fault(group, machine.shared, targets, width, True)
        if machine.races:
            found = machine.races.write(group.lanes, places * width, width)
            if found:
                raise machine.race_fault(group, found, targets, "copies to")
        values = np.zeros((group.count, width), np.uint8)
        wanted = (
            np.full(group.count, width) if given is None else np.broadcast_to(given(group), (group.count,)).astype(int)
        )
        if (wanted > width).any():
            raise machine.fault(
                group, int(group.lanes[np.argmax(wanted)]), f"a source of {wanted.max()} > {width} bytes"
            )
        sources = from_(group)
        full = wanted == width
        if full.any():
            some = group if full.all() else Group(machine.total, group.lanes[full], group.place)
            found = machine.load(some, machine.memory.space, sources[full], width)
            values[full] = np.ascontiguousarray(found).view(np.uint8).reshape(-1, width)
        for index in np.flatnonzero((wanted > 0) & ~full).tolist():
            start = int(sources[index]) - GLOBAL_BASE
            count = int(wanted[index])
            complaint = "out of bounds" if not 0 <= start <= machine.memory.space.size - count else None
            complaint = complaint or machine.memory.space.complaint(start, count, False)
            if start % width:
                complaint = f"an address misaligned for {width} bytes"
            if complaint:
                where = machine.memory.nearest(int(sources[index]))
                raise machine.fault(group, int(group.lanes[index]), f"load of {count} bytes: {complaint} at {where}")
            values[index, :count] = machine.memory.space.data[start : start + count]
        shadow[places] = (shadow[places] | IN_FLIGHT) & ~np.uint8(WRITTEN)
        machine.copies.append(
            Copy(
                instruction,
                group.lanes,
                places,
                values,
                width,
                machine.commits[group.lanes].copy(),
                np.ones(group.count, bool),
            )
        )
        machine.count_copy(group, targets, width)

    return run


def wait(machine, group: Group, count: int | None) -> None:
    """cp.async.wait_group: all copies of a lane arrive except its last `count` groups. None: all, committed or not."""
    waiting = np.zeros(machine.total, bool)
    waiting[group.lanes] = True
    for copy in machine.copies:
        arrives = copy.pending & waiting[copy.lanes]
        if count is not None:
            arrives &= copy.numbers < machine.commits[copy.lanes] - count
        if not arrives.any():
            continue
        places = copy.places[arrives]
        machine.shared.data.reshape(-1, copy.width)[places] = copy.values[arrives]
        shadow = machine.shared.shadow.reshape(-1, copy.width)
        shadow[places] = (shadow[places] & ~np.uint8(IN_FLIGHT)) | WRITTEN
        if machine.races:
            # The thread that waited sees them; others do after a barrier.
            machine.races.write(copy.lanes[arrives], places * copy.width, copy.width)
        copy.pending &= ~arrives
    machine.copies = [copy for copy in machine.copies if copy.pending.any()]


@binds("ldmatrix")
def _ldmatrix(machine, instruction: Instruction) -> Callable:
    require(
        instruction,
        ("sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared", "shared:cta", "b16"),
        instruction.modifiers,
    )
    results = instruction.operands[0]
    results = results if isinstance(results, tuple) else (results,)
    count = {"x1": 1, "x2": 2, "x4": 4}[next(word for word in instruction.modifiers if word in ("x1", "x2", "x4"))]
    if len(results) != count:
        raise PtxError("unknown form")
    space = "shared" if any(word.startswith("shared") for word in instruction.modifiers) else "generic"
    where = address(machine, instruction.operands[1], space)
    puts = [target(machine, result, "b32") for result in results]
    transposed = "trans" in instruction.modifiers

    def run(group: Group) -> None:
        if not group.whole_warps:
            raise machine.fault(group, int(group.lanes[0]), "all lanes of a warp must execute ldmatrix")
        addresses = where(group)
        if space == "generic":
            addresses = addresses - np.uint64(SHARED_WINDOW)
        givers = group.lanes % 32 < 8 * count
        some = group if count == 4 else Group(machine.total, group.lanes[givers], group.place)
        rows = machine.load(some, machine.shared, addresses[givers], 16)
        # [warp, matrix, row, column]
        matrices = rows.view(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            matrices = matrices.transpose(0, 1, 3, 2)
        pairs = np.ascontiguousarray(matrices).view(np.uint32).reshape(-1, count, 32)
        for number, put in enumerate(puts):
            put(group, pairs[:, number].reshape(-1).copy())

    return run
