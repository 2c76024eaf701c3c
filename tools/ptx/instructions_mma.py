"""Products of matrices whose elements a warp holds in registers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .fragments import accumulators, matrix_a, matrix_b, matrix_c
from .groups import Group
from .module import Instruction, PtxError
from .operands import binds, source, target
from .rounding import bfloat_value

U32 = np.uint32


def _elements(values: np.ndarray, count: int, name: str) -> np.ndarray:
    """Registers [lanes] as elements [lanes, e]: integers in float32; floats in float64, where products are exact."""
    raw = np.ascontiguousarray(np.broadcast_to(values, (count,)))
    if name in ("s8", "u8"):
        return raw.view(np.int8 if name == "s8" else np.uint8).reshape(count, 4).astype(np.float32)
    if name == "f16":
        return raw.view(np.float16).reshape(count, 2).astype(np.float64)
    return bfloat_value(raw.view(np.uint16)).reshape(count, 2).astype(np.float64)


# Shape -> registers of A and B. float32 sums of integer products are exact below 2^24.
_INTEGER_SHAPES = {"m16n8k32": (4, 2), "m16n8k16": (2, 1), "m8n8k16": (1, 1)}
_FLOAT_SHAPES = {"m16n8k16": (4, 2), "m16n8k8": (2, 1)}


@binds("mma")
def _mma(machine, instruction: Instruction) -> Callable:
    words = [word for word in instruction.modifiers if word not in ("sync", "aligned", "row", "col")]
    shape, *words = words
    saturate = "satfinite" in words
    words = [word for word in words if word != "satfinite"]
    result, a_name, b_name, c_name = words
    integers = a_name in ("s8", "u8")
    if integers:
        known = b_name in ("s8", "u8") and (result, c_name) == ("s32", "s32")
    else:
        known = a_name == b_name and a_name in ("f16", "bf16") and result in ("f16", "f32") and result == c_name
        known = known and not saturate
    if not known:
        raise PtxError("unknown form")
    a_count, b_count = (_INTEGER_SHAPES if integers else _FLOAT_SHAPES)[shape]
    rows = int(shape[1 : shape.index("n")])
    halves = result == "f16"
    c_registers = rows // 4 // (1 + halves)
    groups = [operand if isinstance(operand, tuple) else (operand,) for operand in instruction.operands]
    if [len(group) for group in groups] != [c_registers, a_count, b_count, c_registers]:
        raise PtxError(f"takes {c_registers}, {a_count}, {b_count} and {c_registers} registers")
    puts = [target(machine, operand, "b32") for operand in groups[0]]
    a_gets, b_gets, c_gets = ([source(machine, operand, "b32") for operand in group] for group in groups[1:])

    def run(group: Group) -> None:
        if not group.whole_warps:
            raise machine.fault(group, int(group.lanes[0]), "all lanes of a warp must execute mma.sync")
        count = group.count
        a = matrix_a([_elements(get(group), count, a_name) for get in a_gets], rows)
        b = matrix_b([_elements(get(group), count, b_name) for get in b_gets])
        c = [np.ascontiguousarray(np.broadcast_to(get(group), (count,))) for get in c_gets]
        if integers:
            product = (a @ b).astype(np.int64) + matrix_c([value.view(np.int32) for value in c])
            if saturate:
                product = np.clip(product, -(2**31), 2**31 - 1)
            values = [value.astype(np.uint64).astype(U32) for value in accumulators(product)]
        elif halves:
            # A register holds both accumulators of a row.
            singles = [part for value in c for part in value.view(np.float16).reshape(-1, 2).T]
            total = (a @ b + matrix_c(singles)).astype(np.float16)
            parts = accumulators(total)
            values = [np.stack(parts[i : i + 2], 1).view(U32).reshape(-1) for i in range(0, len(parts), 2)]
        else:
            total = (a @ b + matrix_c([value.view(np.float32) for value in c])).astype(np.float32)
            values = [value.view(U32) for value in accumulators(total)]
        for put, value in zip(puts, values, strict=True):
            put(group, value.copy())

    return run
