"""lut_linear on a GPU against a device copy, cuBLAS in float16 and low-bit kernels that import, all in one run.

Every competitor is a CUDA graph of calls that rotate through copies of its weight, so that each call finds its weight
in DRAM and not in L2, and no launch waits for Python. The graphs take turns, each after a write that evicts L2, are
timed with events on the device, and the median counts.
"""

from __future__ import annotations

import importlib.util
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import ops
from ..formats import PackedWeight
from ..ops import cuda_library
from . import common

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (14336, 4096))
BATCHES = (1, 2, 4, 8, 16, 32, 128)

OURS = "lut_linear"
COPY = "device copy"
CUBLAS = "cuBLAS fp16"
GEMLITE = "gemlite"
HUMMING = "humming"
PEERS = (CUBLAS, GEMLITE, HUMMING)

# The weights that a graph cycles through, as a multiple of L2: half of it would still be hit by chance at 2.
_L2_MULTIPLE = 4
_MIN_CALLS = 16

Call = Callable[[int], object]
Timer = Callable[[Mapping[str, tuple[Call, int]], int], dict[str, float]]


@dataclass(frozen=True)
class Options:
    """What is measured. Shapes are (out_features, in_features)."""

    bits: int = 2
    act_bits: int = 4
    group_size: int = 128
    dtype: torch.dtype = torch.float16
    shapes: tuple[tuple[int, int], ...] = SHAPES
    batches: tuple[int, ...] = BATCHES
    rounds: int = 15


@dataclass
class Row:
    """Result of one shape and batch; `seconds` holds every competitor by name, per call."""

    batch: int
    out_features: int
    in_features: int
    group_size: int
    weight_bytes: int
    copied_bytes: int
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def bytes_per_second(self) -> float:
        return self.weight_bytes / self.seconds[OURS]

    @property
    def of_device_copy(self) -> float:
        """Our bytes a second over those of a copy, which reads and writes."""
        return self.bytes_per_second / (self.copied_bytes / self.seconds[COPY])

    def speedup(self, peer: str) -> float | None:
        return self.seconds[peer] / self.seconds[OURS] if peer in self.seconds else None


@dataclass(frozen=True)
class Peer:
    """One way to compute y = x W^T; `bind(batch)` gives a function of a call number, which picks a copy of W."""

    name: str
    copies: int
    bind: Callable[[int], Call]


def missing() -> str | None:
    """Why there is nothing to measure: ``skipped: no GPU``; None with a GPU.

    Raises:
        RuntimeError: there is a GPU, and the CUDA kernels are missing.
    """
    if not torch.cuda.is_available():
        return "skipped: no GPU"
    cuda_library.require("bench")
    return None


def copies_needed(weight_bytes: int, device: torch.device) -> int:
    """Copies of a weight that L2 cannot hold several times over; at least so many that a graph is worth timing."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return max(_MIN_CALLS, math.ceil(_L2_MULTIPLE * cache / weight_bytes))


def lut_linear_peer(weight: PackedWeight, options: Options, device: torch.device) -> Peer:
    """Our op as QuantLinear calls it, activation quantization included."""
    blob = ops.pack_weight(weight.to(device))
    copies = [blob, *(blob.clone() for _ in range(copies_needed(weight.nbytes, device) - 1))]
    geometry = (weight.out_features, weight.in_features, weight.bits, weight.group_size, options.act_bits)

    def bind(batch: int) -> Call:
        x = torch.randn(batch, weight.in_features, device=device).to(options.dtype)
        op = torch.ops.rcp_kernels.lut_linear.default
        return lambda i: op(x, copies[i % len(copies)], None, *geometry)

    return Peer(OURS, len(copies), bind)


def copy_peer(weight_bytes: int, device: torch.device) -> Peer:
    """The roof: as many bytes as the weight has, copied from one place to another, so that twice as many move."""
    count = copies_needed(weight_bytes, device)
    sources = [torch.ones(weight_bytes, dtype=torch.uint8, device=device) for _ in range(count)]
    targets = [torch.empty_like(source) for source in sources]
    return Peer(COPY, count, lambda batch: lambda i: targets[i % count].copy_(sources[i % count]))


def cublas_peer(weight: Tensor) -> Peer:
    """torch's linear in float16."""
    copies = [weight.clone() for _ in range(copies_needed(weight.nbytes, weight.device))]

    def bind(batch: int) -> Call:
        x = torch.randn(batch, weight.shape[1], device=weight.device).half()
        return lambda i: F.linear(x, copies[i % len(copies)])

    return Peer(CUBLAS, len(copies), bind)


def gemlite_peer(weight: Tensor, options: Options, group_size: int) -> Peer | None:
    """GemLite's weight-only kernel (Triton) for as many bits: even levels, float16 x. It has no 3 bits."""
    if importlib.util.find_spec("gemlite") is None or options.bits not in (2, 4):
        return None
    from gemlite.helper import A16Wn_HQQ_INT

    out_features, in_features = weight.shape
    codes = torch.randint(0, 2**options.bits, (out_features, in_features), device=weight.device).to(torch.uint8)
    scales = torch.rand(out_features * in_features // group_size, 1, device=weight.device).half()
    make = A16Wn_HQQ_INT(device=str(weight.device), dtype=torch.float16, W_nbits=options.bits)
    layer_bytes = codes.numel() * options.bits // 8 + 4 * scales.numel()
    layers = [
        make.from_weights(codes, scales, torch.ones_like(scales))
        for _ in range(copies_needed(layer_bytes, weight.device))
    ]
    return _layers_peer(GEMLITE, layers, in_features, weight.device)


def humming_peer(weight: Tensor, options: Options, group_size: int) -> Peer | None:
    """Humming's kernel for as many bits: even levels, and float16 x (a16) or int8 (a8), which a4 is closest to."""
    if importlib.util.find_spec("humming") is None:
        return None
    from humming.layer import HummingLayer

    out_features, in_features = weight.shape
    layer_bytes = out_features * in_features * options.bits // 8 + 2 * out_features * in_features // group_size
    layers = []
    for _ in range(copies_needed(layer_bytes, weight.device)):
        layer = HummingLayer(
            shape_n=out_features,
            shape_k=in_features,
            weight_config={"dtype": f"int{options.bits}", "group_size": group_size},
            input_config=None if options.act_bits == 16 else {"dtype": "int8"},
            torch_dtype=torch.float16,
        ).to(weight.device)
        layer.load_from_unquantized(weight)
        layer.transform()
        layers.append(layer)
    return _layers_peer(HUMMING, layers, in_features, weight.device)


def peers(out_features: int, in_features: int, options: Options, device: torch.device) -> tuple[list[Peer], list[str]]:
    """All competitors for one shape, ours first; and a line on each peer that is installed and failed."""
    group_size = common.group_size_for(in_features, options.group_size)
    weight = common.random_packed_weight(out_features, in_features, options.bits, group_size)
    dense = torch.randn(out_features, in_features, device=device).half()
    found = [lut_linear_peer(weight, options, device), copy_peer(weight.nbytes, device), cublas_peer(dense)]
    notes = []
    for name, make in ((GEMLITE, gemlite_peer), (HUMMING, humming_peer)):
        try:
            peer = make(dense, options, group_size)
            if peer is not None:
                call = peer.bind(1)
                call(0)  # compiles, and may refuse this GPU
                found.append(peer)
        except Exception as error:  # another library's, of any kind: no reason to lose the run
            notes.append(f"# {name} failed on {out_features} x {in_features}: {type(error).__name__}: {error}")
    return found, notes


def graph_seconds(calls: Mapping[str, tuple[Call, int]], rounds: int) -> dict[str, float]:
    """Median seconds a call of each competitor on the device.

    Args:
        calls: name -> the function of a call number, and the calls to put into its graph.
        rounds: replays of each graph; the graphs take turns.
    """
    stream = torch.cuda.Stream()
    graphs = {}
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
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, (_, count) in calls.items():
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                graphs[name].replay()  # the clock of an idle GPU is low
                flush.zero_()
                start.record()
                graphs[name].replay()
                end.record()
                end.synchronize()
                samples[name].append(start.elapsed_time(end) / 1e3 / count)
    return {name: statistics.median(values) for name, values in samples.items()}


def measure(options: Options, device: torch.device | str = "cuda", timer: Timer = graph_seconds) -> Iterator[Row | str]:
    """Measure every case, shape by shape; yields rows, and notes on peers that failed."""
    device = torch.device(device)
    for out_features, in_features in options.shapes:
        competitors, notes = peers(out_features, in_features, options, device)
        yield from notes
        group_size = common.group_size_for(in_features, options.group_size)
        weight_bytes = common.random_packed_weight(out_features, in_features, options.bits, group_size).nbytes
        for batch in options.batches:
            row = Row(batch, out_features, in_features, group_size, weight_bytes, 2 * weight_bytes)
            with torch.inference_mode():
                row.seconds = timer(
                    {peer.name: (peer.bind(batch), peer.copies) for peer in competitors}, options.rounds
                )
            yield row


def header(options: Options) -> str:
    """The conditions, as comment lines."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    subject = f"lut_linear W{options.bits}A{options.act_bits}, groups of {options.group_size}, x {options.dtype}"
    return (
        f"# {subject} on {properties.name}, compute capability {properties.major}.{properties.minor}, "
        f"{properties.multi_processor_count} SMs, L2 {properties.L2_cache_size >> 20} MB\n"
        f"# torch {torch.__version__}, CUDA {torch.version.cuda}; CUDA graphs over weights of {_L2_MULTIPLE} x L2, "
        f"L2 evicted before each, medians of {options.rounds}"
    )


def titles() -> str:
    """The column titles of `line`."""
    return f"{'batch':>5} {'N':>6} {'K':>6} | {'us':>8} | {'GB/s':>7} | {'x of a device copy':>18} | " + " | ".join(
        f"{f'x {name}':>13}" for name in PEERS
    )


def line(row: Row) -> str:
    """One case's result; a peer that is not installed is a dash."""
    speedups = [row.speedup(name) for name in PEERS]
    return (
        f"{row.batch:>5} {row.out_features:>6} {row.in_features:>6} | {row.seconds[OURS] * 1e6:>8.2f} | "
        f"{row.bytes_per_second / 1e9:>7.1f} | {row.of_device_copy:>18.2f} | "
        + " | ".join(f"{'-':>13}" if speedup is None else f"{speedup:>13.2f}" for speedup in speedups)
    )


def write_csv(rows: Sequence[Row], options: Options, path: Path) -> None:
    """Write one line per case: the conditions, all times in microseconds, and the derived columns."""
    lines: list[dict[str, Any]] = []
    for row in rows:
        values: dict[str, Any] = {
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
            "bits": options.bits,
            "act_bits": options.act_bits,
            "dtype": str(options.dtype).removeprefix("torch."),
            "group_size": row.group_size,
            "batch": row.batch,
            "out_features": row.out_features,
            "in_features": row.in_features,
            "weight_bytes": row.weight_bytes,
            "gb_per_s": row.bytes_per_second / 1e9,
            "x_device_copy": row.of_device_copy,
        }
        values |= {f"us {name}": seconds * 1e6 for name, seconds in row.seconds.items()}
        values |= {f"x {name}": row.speedup(name) for name in PEERS if name in row.seconds}
        lines.append(values)
    common.write_csv(lines, path)


def _layers_peer(name: str, layers: Sequence[torch.nn.Module], in_features: int, device: torch.device) -> Peer:
    def bind(batch: int) -> Call:
        x = torch.randn(batch, in_features, device=device).half()
        return lambda i: layers[i % len(layers)](x)

    return Peer(name, len(layers), bind)
