"""lut_linear against torch (float32, bfloat16, int4), ggml if there, and a plain read of memory, all in one run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import extras, hardware, ops
from . import common
from .ggml import Ggml

LARGE_SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (14336, 4096))
SHAPES = (*LARGE_SHAPES, (1536, 576), (49152, 576))
BATCHES = (1, 8, 32, 128)
THREADS = (1, 2)

OURS = "lut_linear"
UNIFORM = "lut_linear, uniform groups"
READ = "plain read"
TORCH_FP32 = "torch fp32"
TORCH_BF16 = "torch bf16"
TORCH_INT4 = "torch int4"


@dataclass(frozen=True)
class Options:
    """What is measured. Shapes are (out_features, in_features)."""

    bits: int = 2
    act_bits: int = 4
    group_size: int = 128
    dtype: torch.dtype = torch.bfloat16
    shapes: tuple[tuple[int, int], ...] = SHAPES
    batches: tuple[int, ...] = BATCHES
    threads: tuple[int, ...] = THREADS
    rounds: int = 15


@dataclass(frozen=True)
class Peer:
    """One way to compute y = x W^T with enough copies of W to defeat the cache.

    `bind(batch)` gives the function to time: it takes a running call number, which selects the copy.
    """

    name: str
    weight_bytes: int
    bind: Callable[[int], Callable[[int], object]]


@dataclass
class Row:
    """Result of one shape, batch and thread count; `seconds` holds every competitor by name, per call."""

    threads: int
    batch: int
    out_features: int
    in_features: int
    group_size: int
    weight_bytes: int
    read_bytes: int
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def bytes_per_second(self) -> float:
        return self.weight_bytes / self.seconds[OURS]

    @property
    def of_plain_read(self) -> float:
        return self.bytes_per_second / (self.read_bytes / self.seconds[READ])

    def speedup(self, peer: str) -> float | None:
        return self.seconds[peer] / self.seconds[OURS] if peer in self.seconds else None

    @property
    def over_best_torch_float(self) -> float:
        """Speedup over the faster of torch's float32 and bfloat16."""
        return min(self.seconds[TORCH_FP32], self.seconds[TORCH_BF16]) / self.seconds[OURS]


def lut_linear_peer(out_features: int, in_features: int, options: Options, kind: str = "table") -> Peer:
    """Our op, called as QuantLinear calls it, activation quantization included."""
    group_size = common.group_size_for(in_features, options.group_size)
    weight = common.random_packed_weight(out_features, in_features, options.bits, group_size, kind)
    # Each copy packed, not cloned: pack_weight also asks for huge pages, as it does for a QuantLinear.
    copies = [ops.pack_weight(weight) for _ in range(common.copies_needed(weight.nbytes))]

    def bind(batch: int) -> Callable[[int], object]:
        x = torch.randn(batch, in_features).to(options.dtype)
        op = torch.ops.rcp_kernels.lut_linear.default
        geometry = (out_features, in_features, options.bits, group_size, options.act_bits)

        def call(i: int) -> Tensor:
            y: Tensor = op(x, copies[i % len(copies)], None, *geometry)
            return y

        return call

    return Peer(OURS if kind == "table" else UNIFORM, weight.nbytes, bind)


def torch_peer(out_features: int, in_features: int, dtype: torch.dtype) -> Peer:
    """torch's own linear with x and W of one float dtype."""
    weight = (torch.randn(out_features, in_features) * in_features**-0.5).to(dtype)
    copies = _copies(weight, weight.nbytes)

    def bind(batch: int) -> Callable[[int], object]:
        x = torch.randn(batch, in_features).to(dtype)
        return lambda i: F.linear(x, copies[i % len(copies)])

    return Peer({torch.float32: TORCH_FP32, torch.bfloat16: TORCH_BF16}[dtype], weight.nbytes, bind)


def torch_int4_peer(out_features: int, in_features: int, group_size: int) -> Peer:
    """torch's int4 weight-only kernel: bfloat16 x, a scale and a zero point for each group."""
    group_size = common.group_size_for(in_features, group_size)
    codes = torch.randint(0, 16, (out_features, in_features), dtype=torch.int32)
    weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    del codes
    scales_and_zeros = torch.rand(in_features // group_size, out_features, 2).bfloat16()
    weight_bytes = weight.nbytes + scales_and_zeros.nbytes
    copies = [(weight.clone(), scales_and_zeros.clone()) for _ in range(common.copies_needed(weight_bytes))]

    def bind(batch: int) -> Callable[[int], object]:
        x = torch.randn(batch, in_features).bfloat16()
        op = torch.ops.aten._weight_int4pack_mm_for_cpu.default

        def call(i: int) -> object:
            weight, scales_and_zeros = copies[i % len(copies)]
            return op(x, weight, group_size, scales_and_zeros)

        return call

    return Peer(TORCH_INT4, weight_bytes, bind)


def read_peer() -> Peer:
    """The roof: reading memory and nothing else."""
    buffer = common.read_buffer()
    return Peer(READ, buffer.nbytes, lambda batch: lambda i: common.plain_read(buffer))


def ggml_peer(ggml: Ggml, type_name: str, out_features: int, in_features: int) -> Peer:
    """ggml's matrix product with a weight of one of its own formats and float32 x."""
    copies = common.copies_needed(ggml.weight_bytes(type_name, out_features, in_features))
    weights = ggml.random_weights(type_name, out_features, in_features, copies)
    return Peer(f"ggml {type_name}", weights.nbytes, lambda batch: weights.bind(batch, torch.get_num_threads()))


def peers(out_features: int, in_features: int, options: Options, read: Peer, ggml: Ggml | None) -> list[Peer]:
    """All competitors for one shape, ours first."""
    found = [
        lut_linear_peer(out_features, in_features, options),
        lut_linear_peer(out_features, in_features, options, "uniform"),
        read,
        torch_peer(out_features, in_features, torch.float32),
        torch_peer(out_features, in_features, torch.bfloat16),
    ]
    if hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        found.append(torch_int4_peer(out_features, in_features, options.group_size))
    if ggml is not None:
        found += [
            ggml_peer(ggml, name, out_features, in_features) for name in ggml.types if ggml.fits(name, in_features)
        ]
    return found


def measure(options: Options, ggml: Ggml | None = None) -> Iterator[Row]:
    """Measure every case, shape by shape: the copies of one shape's weights are freed before the next is built."""
    read = read_peer()
    for out_features, in_features in options.shapes:
        competitors = peers(out_features, in_features, options, read, ggml)
        for threads in options.threads:
            for batch in options.batches:
                row = Row(
                    threads=threads,
                    batch=batch,
                    out_features=out_features,
                    in_features=in_features,
                    group_size=common.group_size_for(in_features, options.group_size),
                    weight_bytes=competitors[0].weight_bytes,
                    read_bytes=read.weight_bytes,
                )
                with common.torch_threads(threads), torch.inference_mode():
                    calls = {peer.name: peer.bind(batch) for peer in competitors}
                    row.seconds = common.median_seconds(calls, options.rounds)
                yield row


def header(options: Options) -> str:
    """The conditions, as comment lines."""
    return common.header(
        f"lut_linear W{options.bits}A{options.act_bits}, groups of {options.group_size}, x {options.dtype}",
        f"each competitor rotates through {common.rotated_bytes() >> 20} MB of weights",
        options.rounds,
    )


def titles() -> str:
    """The column titles of `line`."""
    return (
        f"{'threads':>7} {'batch':>5} {'N':>6} {'K':>6} | {'us':>9} | {'GB/s':>6} | {'x plain read':>12} | "
        f"{'x torch fp32':>12} | {'x torch bf16':>12} | {'x torch int4':>12}"
    )


def line(row: Row) -> str:
    """One shape's result."""
    peers = [row.speedup(name) for name in (TORCH_FP32, TORCH_BF16, TORCH_INT4)]
    text = (
        f"{row.threads:>7} {row.batch:>5} {row.out_features:>6} {row.in_features:>6} | "
        f"{row.seconds[OURS] * 1e6:>9.1f} | "
        f"{row.bytes_per_second / 1e9:>6.2f} | {row.of_plain_read:>12.2f} | "
        + " | ".join(f"{'-':>12}" if peer is None else f"{peer:>12.2f}" for peer in peers)
    )
    for name in row.seconds:
        if name == UNIFORM or name.startswith("ggml"):
            text += f" | {row.speedup(name):.2f} x {name}"
    return text


def summary(rows: Sequence[Row]) -> str:
    """Geometric means over the four large shapes, one line for each thread count and batch."""
    lines = ["geometric means over the large shapes (torch float: the faster of fp32 and bf16)"]
    for threads, batch in sorted({(row.threads, row.batch) for row in rows}):
        large = [
            row
            for row in rows
            if (row.threads, row.batch) == (threads, batch) and (row.out_features, row.in_features) in LARGE_SHAPES
        ]
        if not large:
            continue
        text = (
            f"threads {threads} batch {batch:>3}: {_mean(row.of_plain_read for row in large):.2f} of plain read, "
            f"{_mean(row.over_best_torch_float for row in large):.2f} x torch float"
        )
        for name in large[0].seconds:
            speedups = [row.speedup(name) for row in large]
            if name not in (OURS, READ) and None not in speedups:
                text += f", {_mean(s for s in speedups if s is not None):.{3 if name == UNIFORM else 2}f} x {name}"
        lines.append(text)
    return "\n".join(lines) if len(lines) > 1 else ""


def write_csv(rows: Sequence[Row], options: Options, path: Path) -> None:
    """Write one line per case: the conditions, all times in microseconds, and the derived columns."""
    lines = []
    for row in rows:
        line: dict[str, Any] = {
            "bits": options.bits,
            "act_bits": options.act_bits,
            "dtype": str(options.dtype).removeprefix("torch."),
            "group_size": row.group_size,
            "threads": row.threads,
            "batch": row.batch,
            "out_features": row.out_features,
            "in_features": row.in_features,
            "weight_bytes": row.weight_bytes,
            "gb_per_s": row.bytes_per_second / 1e9,
            "plain_read_gb_per_s": row.read_bytes / row.seconds[READ] / 1e9,
            "x_plain_read": row.of_plain_read,
        }
        line |= {f"us {name}": seconds * 1e6 for name, seconds in row.seconds.items() if name != READ}
        line |= {f"x {name}": row.speedup(name) for name in row.seconds if name not in (OURS, READ)}
        lines.append(line)
    common.write_csv(lines, path)


def write_plot(rows: Sequence[Row], options: Options, path: Path) -> None:
    """Write a PNG: speedup over torch against batch for each thread count, and the share of the plain read."""
    extras.require("matplotlib")
    from matplotlib.figure import Figure

    threads = sorted({row.threads for row in rows})
    shapes = list(dict.fromkeys((row.out_features, row.in_features) for row in rows))
    figure = Figure(figsize=(5.5 * (len(threads) + 1), 4.2), layout="constrained")
    *panels, last = figure.subplots(1, len(threads) + 1)
    for axes, count in zip(panels, threads, strict=True):
        for shape in shapes:
            series = [row for row in rows if row.threads == count and (row.out_features, row.in_features) == shape]
            axes.plot(
                [row.batch for row in series],
                [row.over_best_torch_float for row in series],
                marker="o",
                label=f"{shape[0]} x {shape[1]}",
            )
        axes.axhline(1, color="0.5", linewidth=1)
        axes.set_xscale("log", base=2)
        batches = sorted({row.batch for row in rows})
        axes.set_xticks(batches, [str(batch) for batch in batches])
        axes.set_xlabel("tokens")
        axes.set_title(f"x torch (faster of fp32, bf16), {count} thread{'s' * (count > 1)}")
        axes.legend(fontsize="small")
    least = min(row.batch for row in rows)
    height = 0.8 / len(threads)
    for i, count in enumerate(threads):
        series = [row for row in rows if row.threads == count and row.batch == least]
        bars = last.barh(
            [y + height * i for y in range(len(series))],
            [row.of_plain_read for row in series],
            height=height,
            label=f"{count} thread{'s' * (count > 1)}",
        )
        last.bar_label(bars, fmt="%.2f", fontsize="small")
    last.set_yticks(range(len(shapes)), [f"{n} x {k}" for n, k in shapes])
    last.axvline(1, color="0.5", linewidth=1)
    last.set_title(f"share of a plain read of memory, {least} token{'s' * (least > 1)}")
    last.legend(fontsize="small")
    facts = hardware.conditions()
    figure.suptitle(
        f"lut_linear W{options.bits}A{options.act_bits}: {facts['cpu']}, {facts['isa']}, torch {facts['torch']}"
    )
    figure.savefig(path, dpi=150)


def _copies(weight: Tensor, weight_bytes: int) -> list[Tensor]:
    return [weight.clone() for _ in range(common.copies_needed(weight_bytes))]


def _mean(values: Iterable[float]) -> float:
    return common.geometric_mean(list(values))
