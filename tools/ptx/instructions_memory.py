"""Loads, stores, atomics, fences."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .groups import Group
from .memory import LOCAL_WINDOW, SHARED_WINDOW
from .module import Address, Instruction, PtxError, Symbol
from .operands import DTYPES, address, binds, source, target

SPACES = ("global", "shared", "local", "const", "param")
# Caching, eviction and ordering: lanes see all that was stored before, so these have no further meaning here.
HINTS = {"ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "weak", "volatile", "relaxed", "acquire", "release", "acq_rel"}
HINTS |= {"cta", "cluster", "gpu", "sys", "sc", "unified"}
VECTORS = {"v2": 2, "v4": 4, "v8": 8}


def _is_hint(word: str) -> bool:
    return word in HINTS or word.startswith(("L1:", "L2:"))


def split_modifiers(
    instruction: Instruction, further: set[str] | tuple[str, ...] = ()
) -> tuple[str, int, str, list[str]]:
    """(space, elements of the vector, type, words among `further`); anything else is unknown."""
    *words, type_name = instruction.modifiers
    space, count, rest = "generic", 1, []
    for word in words:
        if word.split(":")[0] in SPACES:
            space = word.split(":")[0]
        elif word in VECTORS:
            count = VECTORS[word]
        elif word in further:
            rest.append(word)
        elif not _is_hint(word):
            raise PtxError(f"unknown modifier .{word.replace(':', '::')}")
    if type_name not in DTYPES:
        raise PtxError(f"unknown type .{type_name}")
    return space, count, type_name, rest


def by_space(machine, space: str, group: Group, addresses: np.ndarray) -> list:
    """(space, group, mask or None, addresses in the space). Generic addresses contain their space."""
    if space in ("global", "const"):
        return [(machine.memory.space, group, None, addresses)]
    if space == "shared":
        return [(machine.shared, group, None, addresses)]
    if space == "local":
        return [(machine.local, group, None, addresses)]
    low, high = addresses.min(), addresses.max()
    if high < LOCAL_WINDOW:
        return [(machine.memory.space, group, None, addresses)]
    if low >= SHARED_WINDOW:
        return [(machine.shared, group, None, addresses - np.uint64(SHARED_WINDOW))]
    if low >= LOCAL_WINDOW and high < SHARED_WINDOW:
        return [(machine.local, group, None, addresses - np.uint64(LOCAL_WINDOW))]
    parts = []
    for name, start, end, base in (
        ("global", 0, LOCAL_WINDOW, 0),
        ("local", LOCAL_WINDOW, SHARED_WINDOW, LOCAL_WINDOW),
        ("shared", SHARED_WINDOW, 1 << 63, SHARED_WINDOW),
    ):
        mask = (addresses >= np.uint64(start)) & (addresses < np.uint64(end))
        if mask.any():
            there = machine.memory.space if name == "global" else getattr(machine, name)
            some = Group(machine.total, group.lanes[mask], group.place)
            parts.append((there, some, mask, addresses[mask] - np.uint64(base)))
    return parts


@binds("ld", "ldu")
def _ld(machine, instruction: Instruction) -> Callable:
    space, count, type_name, _ = split_modifiers(instruction)
    operands = instruction.operands
    results = operands[0] if isinstance(operands[0], tuple) else (operands[0],)
    if len(results) != count:
        raise PtxError(f"a vector of {count} cannot go to {results}")
    puts = [target(machine, result, type_name) for result in results]
    if space == "param":
        return _load_parameter(machine, operands[1], type_name, puts)
    size = DTYPES[type_name].itemsize
    width = size * count
    where = address(machine, operands[1], space)
    raw = f"u{size}"
    dtype = DTYPES[type_name]
    constant = "nc" in instruction.modifiers

    def run(group: Group) -> None:
        addresses = where(group)
        parts = by_space(machine, space, group, addresses)
        if len(parts) == 1:
            there, _, _, inside = parts[0]
            values = machine.load(group, there, inside, width, constant)
        else:
            values = np.empty(
                (group.count, 2) if width == 16 else group.count, np.uint64 if width >= 8 else f"u{width}"
            )
            for there, some, mask, inside in parts:
                values[mask] = machine.load(some, there, inside, width, constant)
        if count == 1:
            puts[0](group, values.view(dtype))
        else:
            rows = values.view(raw).reshape(group.count, count)
            for column, put in enumerate(puts):
                put(group, rows[:, column].copy().view(dtype))

    return run


def refused(machine, what: str) -> Callable:
    """An instruction that a kernel may contain but not execute."""

    def run(group: Group) -> None:
        raise machine.fault(group, int(group.lanes[0]), f"the executor knows no functions, got {what}")

    return run


@binds("call")
def _call(machine, instruction: Instruction) -> Callable:
    return refused(machine, "a call")


def _load_parameter(machine, operand: Address, type_name: str, puts: list) -> Callable:
    dtype = DTYPES[type_name]
    if isinstance(operand.base, str):
        # nvcc moves the address of a structure to a register and loads with offsets from it.
        where = address(machine, operand, "param")
        data = np.frombuffer(machine.parameters, np.uint8)
        width = dtype.itemsize * len(puts)

        def run_from_register(group: Group) -> None:
            places = where(group)
            if places.max() > data.size - width or (places % np.uint64(dtype.itemsize)).any():
                raise machine.fault(group, int(group.lanes[0]), f"a load outside the {data.size} bytes of parameters")
            rows = data[places.view(np.int64)[:, None] + np.arange(width)].view(dtype)
            for column, put in enumerate(puts):
                put(group, rows[:, column].copy())

        return run_from_register
    if not isinstance(operand.base, Symbol) or operand.base.name not in machine.layout.parameters:
        return refused(machine, "the result of a call")
    start = machine.layout.parameters[operand.base.name] + operand.base.offset + operand.offset
    values = np.frombuffer(machine.parameters, np.uint8)[start : start + dtype.itemsize * len(puts)].copy().view(dtype)
    if values.size != len(puts):
        raise PtxError("a load from beyond the parameters")

    def run(group: Group) -> None:
        for value, put in zip(values, puts, strict=True):
            put(group, np.full(group.count, value, dtype))

    return run


@binds("st")
def _st(machine, instruction: Instruction) -> Callable:
    space, count, type_name, _ = split_modifiers(instruction)
    operands = instruction.operands
    sources = operands[1] if isinstance(operands[1], tuple) else (operands[1],)
    if space == "param":
        return refused(machine, "a call")
    if len(sources) != count or space == "const":
        raise PtxError(f"a vector of {count} cannot come from {sources}")
    size = DTYPES[type_name].itemsize
    width = size * count
    raw = f"u{size}"
    gets = [source(machine, operand, f"b{8 * size}") for operand in sources]
    where = address(machine, operands[0], space)
    wide = np.dtype(f"u{min(width, 8)}")

    def run(group: Group) -> None:
        addresses = where(group)
        if count == 1:
            values = np.broadcast_to(gets[0](group), (group.count,))
        else:
            rows = np.empty((group.count, count), raw)
            for column, get in enumerate(gets):
                rows[:, column] = get(group)
            values = rows.view(wide)
            values = values.reshape(-1) if width <= 8 else values
        for there, some, mask, inside in by_space(machine, space, group, addresses):
            machine.store(some, there, inside, width, values if mask is None else values[mask])

    return run


@binds("prefetch", "prefetchu", "createpolicy", "discard", "applypriority")
def _hint(machine, instruction: Instruction) -> Callable:
    if instruction.base == "createpolicy":
        put = target(machine, instruction.operands[0], "b64")
        return lambda group: put(group, np.zeros(group.count, np.uint64))
    return lambda group: None


@binds("membar", "fence")
def _fence(machine, instruction: Instruction) -> Callable:
    # A fence of the block alone, or between proxies, orders nothing for other blocks.
    wide = not {"cta", "proxy"} & {word.split(":")[0] for word in instruction.modifiers}

    def run(group: Group) -> None:
        if machine.visibility and wide:
            machine.visibility.fence(np.unique(machine.number_warps(group)))

    return run


@binds("nanosleep", "pmevent")
def _nothing(machine, instruction: Instruction) -> Callable:
    return lambda group: None


def _increment(old: int, operand: int) -> int:
    return 0 if old >= operand else old + 1


def _decrement(old: int, operand: int) -> int:
    return operand if old == 0 or old > operand else old - 1


_ATOMIC = {
    "add": lambda old, operand: old + operand,
    "min": min,
    "max": max,
    "inc": _increment,
    "dec": _decrement,
    "and": lambda old, operand: old & operand,
    "or": lambda old, operand: old | operand,
    "xor": lambda old, operand: old ^ operand,
    "exch": lambda old, operand: operand,
}
_AT_ONCE = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or}
_AT_ONCE |= {"xor": np.bitwise_xor, "exch": lambda old, operand: operand}


@binds("atom", "red")
def _atom(machine, instruction: Instruction) -> Callable:
    space, count, type_name, words = split_modifiers(instruction, {*_ATOMIC, "cas", "noftz"})
    operation = next(word for word in words if word != "noftz")
    if count != 1 or type_name.endswith("x2") or type_name in ("f16", "bf16"):
        raise PtxError("unknown form")
    operands = list(instruction.operands)
    put = target(machine, operands.pop(0), type_name) if instruction.base == "atom" else None
    where = address(machine, operands[0], space)
    gets = [source(machine, operand, type_name) for operand in operands[1:]]
    dtype = DTYPES[type_name]
    width = dtype.itemsize
    words = set(instruction.modifiers)
    releases = {"release", "acq_rel"} & words and "cta" not in words
    acquires = {"acquire", "acq_rel"} & words and "cta" not in words

    def one_by_one(there, places: np.ndarray, values: list, some: Group) -> np.ndarray:
        memory = there.views[width].view(dtype)
        old = np.empty(some.count, dtype)
        for index, place in enumerate(places.tolist()):
            before = memory[place]
            old[index] = before
            if operation == "cas":
                if before == values[0][index]:
                    memory[place] = values[1][index]
            elif dtype.kind == "f":
                memory[place] = {"add": np.add, "min": np.fmin, "max": np.fmax}[operation](before, values[0][index])
            else:
                result = _ATOMIC[operation](int(before), int(values[0][index]))
                memory[place] = np.array(result & (2 ** (8 * width) - 1), f"u{width}").view(dtype)
        return old

    def run(group: Group) -> None:
        addresses = where(group)
        values = [np.broadcast_to(get(group), (group.count,)) for get in gets]
        result = np.empty(group.count, dtype)
        for there, some, mask, inside in by_space(machine, space, group, addresses):
            mine = values if mask is None else [value[mask] for value in values]
            places = machine.places(some, there, inside, width, True)
            # Atomics do not race with each other, so the checks of reads and writes do not apply.
            if there.load(places, width, False) is None:
                raise machine.access_fault(some, there, inside, width, False)
            if np.unique(places).size == places.size and operation in _AT_ONCE and dtype.kind != "f":
                memory = there.views[width].view(dtype)
                old = memory[places]
                memory[places] = _AT_ONCE[operation](old, mine[0])
            else:
                old = one_by_one(there, places, mine, some)
            if not there.store(places, width, there.views[width][places]):
                raise machine.access_fault(some, there, inside, width, True)
            if mask is None:
                result = old
            else:
                result[mask] = old
            if there is machine.memory.space and machine.visibility:
                warps = machine.number_warps(some)
                warps = warps[np.sort(np.unique(warps, return_index=True)[1])]
                if releases:
                    machine.visibility.fence(warps)
                machine.visibility.atomic(warps)
                if acquires:
                    machine.visibility.acquire(warps)
        if put is not None:
            put(group, result)

    return run
