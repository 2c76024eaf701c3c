"""Special registers: the place of a thread, and the sizes of its block and grid."""

from __future__ import annotations

import numpy as np

__all__ = ["special_bytes", "special_value"]

_AXES = {"x": 0, "y": 1, "z": 2}


def special_bytes(name: str) -> int:
    """Bytes of a special register; 0 if the executor does not know it."""
    base, _, axis = name[1:].partition(".")
    if base in ("tid", "ntid", "ctaid", "nctaid"):
        return 4 if axis in _AXES else 0
    if base in ("clock64", "globaltimer"):
        return 8
    known = ("laneid", "warpid", "nwarpid", "smid", "nsmid", "clock", "dynamic_smem_size", "total_smem_size")
    masks = ("lanemask_eq", "lanemask_lt", "lanemask_le", "lanemask_gt", "lanemask_ge")
    return 4 if base in known + masks else 0


def special_value(machine, name: str) -> np.ndarray:
    """A special register's value in every lane of the machine."""
    base, _, axis = name[1:].partition(".")
    launch = machine.launch
    lanes = np.arange(machine.total)
    threads = np.minimum(lanes % machine.lanes_per_block, machine.threads - 1)
    if base == "tid":
        x, y, _ = launch.block
        return (threads % x, threads // x % y, threads // (x * y))[_AXES[axis]]
    if base == "ctaid":
        return np.array(machine.blocks)[:, _AXES[axis]][machine.block_of_lane]
    lane = lanes % 32
    below = (np.int64(1) << lane) - 1
    own = below + 1
    values = {
        "laneid": lane,
        "warpid": threads // 32,
        "nwarpid": machine.lanes_per_block // 32,
        "smid": machine.block_of_lane,
        "nsmid": 128,
        "clock": 0,
        "clock64": 0,
        "globaltimer": 0,
        "dynamic_smem_size": launch.shared_bytes,
        "total_smem_size": machine.layout.shared,
        "lanemask_eq": own,
        "lanemask_lt": below,
        "lanemask_le": below | own,
        "lanemask_gt": ~(below | own) & 0xFFFFFFFF,
        "lanemask_ge": ~below & 0xFFFFFFFF,
    }
    if base == "ntid":
        value = launch.block[_AXES[axis]]
    elif base == "nctaid":
        value = launch.grid[_AXES[axis]]
    else:
        value = values[base]
    return np.broadcast_to(np.asarray(value), (machine.total,)).copy()
