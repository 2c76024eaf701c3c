"""What all benchmarks share: random packed weights, copies that outgrow the cache, and timing in turns."""

from __future__ import annotations

import contextlib
import csv
import datetime
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import hardware
from ..formats import PackedWeight, num_groups, row_bytes

# A weight that is still in the last-level cache would be read at several times the speed of memory.
_CACHE_MULTIPLE = 4
_MIN_ROTATED_BYTES = 256 << 20

# A turn lasts about this long, so that the clock and the caller's loop cost well under a thousandth of it.
_TURN_SECONDS = 2e-3

# Idle threads of another competitor's pool spin for about a millisecond before they sleep: not in our turn.
_PAUSE_SECONDS = 2e-3

# Of a competitor that has used up its time; a median of fewer would be no better than one sample.
_LEAST_ROUNDS = 3

READ_STREAMS = 8


def rotated_bytes() -> int:
    """Bytes of weights a benchmark must cycle through so that each call reads from memory, not from cache."""
    return max(_CACHE_MULTIPLE * hardware.last_level_cache_bytes(), _MIN_ROTATED_BYTES)


def copies_needed(weight_bytes: int) -> int:
    """Copies of one weight that make up rotated_bytes(); at least two."""
    return max(2, math.ceil(rotated_bytes() / weight_bytes))


def group_size_for(in_features: int, group_size: int) -> int:
    """group_size, halved until it divides in_features (576 = 9 * 64), but not below 32."""
    while in_features % group_size and group_size > 32:
        group_size //= 2
    return group_size


def random_packed_weight(
    out_features: int, in_features: int, bits: int, group_size: int, kind: str = "table"
) -> PackedWeight:
    """A weight of random codes, ascending random levels and scales of about 1/in_features**0.5, made in packed form."""
    groups = num_groups(in_features, group_size)
    if kind == "uniform":
        levels = torch.randint(-72, -56, (out_features, groups, 1)).to(torch.int8)  # about symmetric grids
    else:
        width = 254 / 2**bits
        starts = torch.arange(2**bits) * width - 127
        levels = (starts + torch.randint(0, int(width), (out_features, groups, 2**bits))).floor().to(torch.int8)
    scale = in_features**-0.5 / 64
    return PackedWeight(
        codes=torch.randint(0, 256, (out_features, row_bytes(in_features, bits, group_size)), dtype=torch.uint8),
        levels=levels,
        scales=torch.empty(out_features, groups).uniform_(scale, 2 * scale).half(),
        tensor_scale=torch.tensor(1.0),
        bits=bits,
        group_size=group_size,
        in_features=in_features,
        out_features=out_features,
        kind=kind,
    )


def read_buffer() -> torch.Tensor:
    """rotated_bytes() of memory, every page written, for plain_read: untouched pages would all be the one zero page."""
    return torch.ones(rotated_bytes() // 8, dtype=torch.int64)


def plain_read(buffer: torch.Tensor) -> int:
    """Read all of buffer once as READ_STREAMS sequential streams a thread, at the speed of memory."""
    total: int = torch.ops.rcp_kernels.plain_read(buffer, READ_STREAMS)
    return total


def calls_per_turn(call: Callable[[int], object]) -> int:
    """Calls that take about 2 ms, at least one; found with call numbers 0 and 1, of which 0 warms up."""
    call(0)
    start = time.perf_counter()
    call(1)
    return max(1, math.ceil(_TURN_SECONDS / (time.perf_counter() - start)))


def median_seconds(
    calls: Mapping[str, Callable[[int], object]], rounds: int, budget: float = math.inf
) -> dict[str, float]:
    """Median seconds per call of each competitor, all taking turns in one run.

    Args:
        calls: name -> function of a running call number, which it uses to pick the next copy of its weight.
        rounds: turns of each competitor. A turn is a pause, one call that wakes the thread pool and is not timed, and
            as many calls as take about 2 ms, at least one; its sample is the mean of those.
        budget: seconds of timed calls after which a competitor takes no further turn, though it gets three at least.
    """
    per_turn = {name: calls_per_turn(call) for name, call in calls.items()}
    count = dict.fromkeys(calls, 2)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for done in range(rounds):
        for name, call in calls.items():
            if done >= _LEAST_ROUNDS and sum(samples[name]) * per_turn[name] > budget:
                continue
            time.sleep(_PAUSE_SECONDS)
            call(count[name])
            first = count[name] + 1
            count[name] = first + per_turn[name]
            start = time.perf_counter()
            for i in range(first, count[name]):
                call(i)
            samples[name].append((time.perf_counter() - start) / per_turn[name])
    return {name: statistics.median(values) for name, values in samples.items()}


@contextlib.contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """torch's pool has so many threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def header(subject: str, data: str, rounds: int) -> str:
    """What is measured and under which conditions, as comment lines; `data` says where the competitors' data lie."""
    facts = hardware.conditions()
    return "\n".join(
        (
            f"# {subject}",
            f"# {facts['cpu']}, {facts['cpus']} CPUs, kernels use {facts['isa']}, "
            f"last-level cache {facts['last_level_cache_mb']:.0f} MB, {data}",
            f"# torch {facts['torch']} ({facts['torch_cpu_capability']}), Python {facts['python']}, "
            f"{datetime.datetime.now().astimezone():%Y-%m-%d %H:%M %Z}, medians of {rounds} rounds",
        )
    )


def write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write one line per row, the date and the conditions before its own columns; a column that a row lacks is empty.

    Floats are rounded to five significant digits.
    """
    date = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    before = {"date": date} | hardware.conditions()
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys([*before, *(name for row in rows for name in row)])))
        writer.writeheader()
        for row in rows:
            writer.writerow(
                before | {name: f"{value:.5g}" if isinstance(value, float) else value for name, value in row.items()}
            )


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def output_directory(path: Path) -> Path:
    """path, created if need be."""
    path.mkdir(parents=True, exist_ok=True)
    return path
