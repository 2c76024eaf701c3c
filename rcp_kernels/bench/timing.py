"""Times calls against each other: competitors take turns, and each cycles through more data than the cache holds."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping

import torch

from .. import hardware

Call = Callable[[int], object]
"""One call of a competitor. The argument numbers the calls and selects the copy of the data."""
Timer = Callable[[Mapping[str, tuple[Call, int]], int], dict[str, float]]
"""(name -> call and number of copies, rounds) -> median seconds per call."""

CPU, CUDA = torch.device("cpu"), torch.device("cuda")

# A weight that is still in the last-level cache is read at several times the speed of memory.
_CACHE_MULTIPLE = 4
_LEAST_ROTATED_BYTES = 256 << 20
# On a GPU a graph of fewer calls is too short to time. At 2 x L2 half the data still hits by chance.
_L2_MULTIPLE = 4
_LEAST_GRAPH_CALLS = 16
# L2 is evicted before a graph, which reads each copy once. More calls would only make captures of small data slow: four
# times the L2 of an H200 is a million rows of 128 float16 numbers.
_MOST_GRAPH_CALLS = 256

# A turn of 2 ms makes the clock and the caller's loop cost well under a thousandth.
_TURN_SECONDS = 2e-3
# Idle threads of another library's pool spin for about 1 ms before they sleep. They must not spin in the next turn.
_PAUSE_SECONDS = 2e-3
# Rounds of a competitor that has used up its budget. A median of fewer is no better than one sample.
_LEAST_ROUNDS = 3

READ_STREAMS = 8
GRAPHS = "CUDA graphs over data of 4 x L2, L2 evicted before each"
"""How :func:`graph_seconds` measures, for the header of a benchmark."""

# The bytes that a `rotating` block gives. None outside of such a block.
_given_rotation: int | None = None


@contextlib.contextmanager
def rotating(nbytes: int) -> Iterator[None]:
    """Let CPU benchmarks inside the block cycle through nbytes of data, which the cache may hold.

    The last-level cache of a virtual machine can be that of a whole host: 480 MB, of which 12,000 packed weights of
    1024 x 1024 made four times as much in 180 seconds.
    """
    global _given_rotation
    before, _given_rotation = _given_rotation, nbytes
    try:
        yield
    finally:
        _given_rotation = before


def rotated_bytes() -> int:
    """Bytes of data that a CPU benchmark cycles through, so that each call reads from memory and not from cache."""
    return _given_rotation or max(_CACHE_MULTIPLE * hardware.last_level_cache_bytes(), _LEAST_ROTATED_BYTES)


def copies_needed(nbytes: int, device: torch.device = CPU) -> int:
    """Copies of nbytes that outgrow the cache: rotated_bytes() on a CPU, four times L2 but 16 to 256 on a GPU.

    Another device gets at most 256. Each copy is checked against the reference first.
    """
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        wanted = math.ceil(_L2_MULTIPLE * cache / max(1, nbytes))
        return min(max(_LEAST_GRAPH_CALLS, wanted), _MOST_GRAPH_CALLS)
    copies = max(2, math.ceil(rotated_bytes() / nbytes))
    return copies if device.type == "cpu" else min(copies, _MOST_GRAPH_CALLS)


def read_buffer() -> torch.Tensor:
    """rotated_bytes() of memory for :func:`plain_read`. Every page is written: untouched pages share one zero page."""
    return torch.ones(rotated_bytes() // 8, dtype=torch.int64)


def plain_read(buffer: torch.Tensor) -> int:
    """Read buffer once, as READ_STREAMS sequential streams per thread, at the speed of memory. Returns its sum."""
    total: int = torch.ops.rcp_kernels.plain_read(buffer, READ_STREAMS)
    return total


@contextlib.contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Give torch's pool this many threads inside the block. None leaves the pool alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def calls_per_turn(call: Call, device: torch.device = CPU) -> int:
    """Calls that take about 2 ms, at least one. Calls 0 (a warm-up) and 1 tell."""
    call(0)
    hardware.synchronize(device)
    start = time.perf_counter()
    call(1)
    hardware.synchronize(device)
    return max(1, math.ceil(_TURN_SECONDS / (time.perf_counter() - start)))


def median_seconds(
    calls: Mapping[str, Call], rounds: int, budget: float = math.inf, device: torch.device = CPU
) -> dict[str, float]:
    """Median seconds per call of each competitor by the clock of the CPU.

    A turn is a pause, one untimed call that wakes the thread pool, and calls for about 2 ms. The mean of these calls is
    one sample.

    Args:
        calls: competitors by name.
        rounds: turns of each competitor.
        budget: seconds of timed calls after which a competitor takes no further turn. Each takes at least three.
        device: that the calls compute on. A turn ends when it is done.
    """
    per_turn = {name: calls_per_turn(call, device) for name, call in calls.items()}
    count = dict.fromkeys(calls, 2)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for done in range(rounds):
        for name, call in calls.items():
            if done >= _LEAST_ROUNDS and sum(samples[name]) * per_turn[name] > budget:
                continue
            time.sleep(_PAUSE_SECONDS)
            call(count[name])
            hardware.synchronize(device)
            first = count[name] + 1
            count[name] = first + per_turn[name]
            start = time.perf_counter()
            for i in range(first, count[name]):
                call(i)
            hardware.synchronize(device)
            samples[name].append((time.perf_counter() - start) / per_turn[name])
    return {name: statistics.median(values) for name, values in samples.items()}


def graph_seconds(calls: Mapping[str, tuple[Call, int]], rounds: int) -> dict[str, float]:
    """Median seconds per call of each competitor on the GPU, without the cost of launches from Python.

    Each competitor is a CUDA graph with one call per copy of its data. The graphs take turns, each after a write that
    evicts L2. Events on the device time them.
    """
    stream = torch.cuda.Stream()
    graphs = {}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    with torch.cuda.stream(stream):
        for name, (call, count) in calls.items():
            for i in range(3):
                call(i)  # tuning, caches and workspaces, which a capture does not allow
            stream.synchronize()
            graphs[name] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graphs[name], stream=stream):
                for i in range(count):
                    call(i)
        cache = torch.cuda.get_device_properties(stream.device).L2_cache_size
        flush = torch.empty(2 * cache, dtype=torch.uint8, device=stream.device)
        for _ in range(rounds):
            for name, (_, count) in calls.items():
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                graphs[name].replay()  # an idle GPU has a low clock
                flush.zero_()
                start.record()
                graphs[name].replay()
                end.record()
                end.synchronize()
                samples[name].append(start.elapsed_time(end) / 1e3 / count)
    return {name: statistics.median(values) for name, values in samples.items()}
