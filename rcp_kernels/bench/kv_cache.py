"""Decode attention on the 4-bit cache against torch on float caches and a plain read of memory, all in one run."""

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

# Attention of SmolLM2-135M, LLaMA-3-8B and LLaMA-2-7B: (heads, kv_heads, head_dim).
SHAPES = ((9, 3, 64), (32, 8, 128), (32, 32, 128))
CONTEXTS = (512, 2048, 8192)
THREADS = (1, 2)

OURS = "kv_cache_attention"
READ = "plain read"
SDPA_FP32 = "sdpa fp32"
SDPA_BF16 = "sdpa bf16"
DEQUANTIZE = "dequantize + sdpa"
PEERS = (SDPA_FP32, SDPA_BF16, DEQUANTIZE)

_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 6e-2}


@dataclass(frozen=True)
class Options:
    """What is measured: one query token of one sequence, at so many positions in the cache."""

    dtype: torch.dtype = torch.float32
    shapes: tuple[tuple[int, int, int], ...] = SHAPES
    contexts: tuple[int, ...] = CONTEXTS
    threads: tuple[int, ...] = THREADS
    rounds: int = 15


@dataclass(frozen=True)
class Peer:
    """One way to attend, with enough copies of the cache to defeat the processor's.

    `call` is the function to time: it takes a running call number, which selects the copy.
    """

    name: str
    cache_bytes: int
    call: Callable[[int], object]


@dataclass
class Row:
    """Result of one shape, context and thread count; `seconds` holds every competitor by name, per call."""

    threads: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    cache_bytes: int
    read_bytes: int
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def bytes_per_second(self) -> float:
        """Codes and scales of keys and values, read once."""
        return self.cache_bytes / self.seconds[OURS]

    @property
    def of_plain_read(self) -> float:
        return self.bytes_per_second / (self.read_bytes / self.seconds[READ])

    def speedup(self, peer: str) -> float:
        return self.seconds[peer] / self.seconds[OURS]


def packed_peers(heads: int, kv_heads: int, head_dim: int, context: int, options: Options) -> list[Peer]:
    """Our op, and what any other attention does with the packed cache: dequantize it, then attend.

    Raises:
        RuntimeError: the op computes something else than its reference.
    """

    def filled() -> tuple[Tensor, Tensor]:
        codes, scales = ops.empty_kv_cache(1, kv_heads, context, head_dim)
        ops.kv_cache_append(torch.randn(1, kv_heads, context, head_dim), codes, scales, 0)
        return codes, scales

    storage = ops.KVStorage(*filled(), *filled())
    cache_bytes = sum(tensor.nbytes for tensor in storage)
    copies = [
        ops.KVStorage(*(tensor.clone() for tensor in storage))
        for _ in range(common.copies_needed(cache_bytes))
    ]
    query = torch.randn(1, heads, 1, head_dim).to(options.dtype)
    error = (ops.kv_cache_attention(query, storage, context).double()
             - ops.reference.kv_cache_attention(query, storage, context)).abs().max().item()  # fmt: skip
    if not error <= _TOLERANCE[options.dtype]:
        raise RuntimeError(f"{OURS} is off by {error:.2g} at {heads} heads, head_dim {head_dim}, context {context}")
    grouped = query.view(1, kv_heads, heads // kv_heads, head_dim)

    def dequantized(i: int) -> Tensor:
        key_codes, key_scales, value_codes, value_scales = copies[i % len(copies)]
        keys = ops.kv_cache_dequantize(key_codes, key_scales, context, head_dim, options.dtype)
        values = ops.kv_cache_dequantize(value_codes, value_scales, context, head_dim, options.dtype)
        return F.scaled_dot_product_attention(grouped, keys, values)

    return [
        Peer(OURS, cache_bytes, lambda i: ops.kv_cache_attention(query, copies[i % len(copies)], context)),
        Peer(DEQUANTIZE, cache_bytes, dequantized),
    ]


def sdpa_peer(heads: int, kv_heads: int, head_dim: int, context: int, dtype: torch.dtype) -> Peer:
    """torch's attention on a float cache; query heads that share a head are its queries, as transformers packs them."""
    keys, values = (torch.randn(1, kv_heads, context, head_dim).to(dtype) for _ in range(2))
    cache_bytes = keys.nbytes + values.nbytes
    copies = [(keys.clone(), values.clone()) for _ in range(common.copies_needed(cache_bytes))]
    query = torch.randn(1, kv_heads, heads // kv_heads, head_dim).to(dtype)
    name = {torch.float32: SDPA_FP32, torch.bfloat16: SDPA_BF16}[dtype]
    return Peer(name, cache_bytes, lambda i: F.scaled_dot_product_attention(query, *copies[i % len(copies)]))


def builders(options: Options) -> dict[str, Callable[[int, int, int, int], list[Peer]]]:
    """What makes the competitors of a case from (heads, kv_heads, head_dim, context), by the name of the first."""

    def packed(heads: int, kv_heads: int, head_dim: int, context: int) -> list[Peer]:
        return packed_peers(heads, kv_heads, head_dim, context, options)

    def sdpa(dtype: torch.dtype) -> Callable[[int, int, int, int], list[Peer]]:
        return lambda heads, kv_heads, head_dim, context: [sdpa_peer(heads, kv_heads, head_dim, context, dtype)]

    return {OURS: packed, SDPA_FP32: sdpa(torch.float32), SDPA_BF16: sdpa(torch.bfloat16)}


def measure(options: Options) -> Iterator[Row]:
    """Measure every case: the copies of one are freed before the next is built."""
    buffer = common.read_buffer()
    for heads, kv_heads, head_dim in options.shapes:
        for context in options.contexts:
            with torch.inference_mode():
                made = builders(options).values()
                competitors = [peer for build in made for peer in build(heads, kv_heads, head_dim, context)]
            for threads in options.threads:
                with common.torch_threads(threads), torch.inference_mode():
                    calls: dict[str, Callable[[int], object]] = {peer.name: peer.call for peer in competitors}
                    calls[READ] = lambda i: common.plain_read(buffer)
                    seconds = common.median_seconds(calls, options.rounds)
                yield Row(
                    threads, heads, kv_heads, head_dim, context, competitors[0].cache_bytes, buffer.nbytes, seconds
                )
            del competitors, calls


def header(options: Options) -> str:
    """The conditions, as comment lines."""
    return "\n".join(
        (
            common.header(
                f"attention of one {_name(options.dtype)} query token on a 4-bit cache, batch 1",
                f"each competitor rotates through {common.rotated_bytes() >> 20} MB of caches",
                options.rounds,
            ),
            f"# {DEQUANTIZE}: what any other attention costs on the packed cache, in {_name(options.dtype)}",
        )
    )


def titles() -> str:
    """The column titles of `line`."""
    return (
        f"{'threads':>7} {'heads':>5} {'kv':>3} {'head_dim':>8} {'context':>7} | {'us':>9} | {'GB/s':>6} | "
        + " | ".join(f"{'x ' + name:>{len(name) + 2}}" for name in (READ, *PEERS))
    )


def line(row: Row) -> str:
    """One case's result."""
    text = (
        f"{row.threads:>7} {row.heads:>5} {row.kv_heads:>3} {row.head_dim:>8} {row.context:>7} | "
        f"{row.seconds[OURS] * 1e6:>9.1f} | {row.bytes_per_second / 1e9:>6.1f} | "
        f"{row.of_plain_read:>{len(READ) + 2}.2f}"
    )
    return text + "".join(f" | {row.speedup(name):>{len(name) + 2}.2f}" for name in PEERS)


def summary(rows: Sequence[Row]) -> str:
    """Geometric means over the shapes, one line for each thread count and context."""
    lines = ["geometric means over the shapes"]
    for threads, context in sorted({(row.threads, row.context) for row in rows}):
        cases = [row for row in rows if (row.threads, row.context) == (threads, context)]
        text = f"threads {threads} context {context:>5}: {_mean(row.of_plain_read for row in cases):.2f} of plain read"
        lines.append(text + "".join(f", {_mean(row.speedup(name) for row in cases):.1f} x {name}" for name in PEERS))
    return "\n".join(lines)


def write_csv(rows: Sequence[Row], options: Options, path: Path) -> None:
    """Write one line per case: the conditions, all times in microseconds, and the derived columns."""
    lines = []
    for row in rows:
        line: dict[str, Any] = {
            "dtype": _name(options.dtype),
            "threads": row.threads,
            "heads": row.heads,
            "kv_heads": row.kv_heads,
            "head_dim": row.head_dim,
            "context": row.context,
            "cache_bytes": row.cache_bytes,
            "gb_per_s": row.bytes_per_second / 1e9,
            "plain_read_gb_per_s": row.read_bytes / row.seconds[READ] / 1e9,
            "x_plain_read": row.of_plain_read,
        }
        line |= {f"us {name}": row.seconds[name] * 1e6 for name in (OURS, *PEERS)}
        line |= {f"x {name}": row.speedup(name) for name in PEERS}
        lines.append(line)
    common.write_csv(lines, path)


def write_plot(rows: Sequence[Row], options: Options, path: Path) -> None:
    """Write a PNG: the speedup over each peer against the context, one panel for each thread count."""
    extras.require("matplotlib")
    from matplotlib.figure import Figure

    threads = sorted({row.threads for row in rows})
    figure = Figure(figsize=(5.5 * len(threads), 4.2), layout="constrained")
    for axes, count in zip(figure.subplots(1, len(threads), squeeze=False)[0], threads, strict=True):
        for i, (heads, kv_heads, head_dim) in enumerate(options.shapes):
            series = [
                row
                for row in rows
                if (row.threads, row.heads, row.kv_heads, row.head_dim) == (count, heads, kv_heads, head_dim)
            ]
            for name, style in zip(PEERS, ("-", "--", ":"), strict=True):
                axes.plot(
                    [row.context for row in series],
                    [row.speedup(name) for row in series],
                    style,
                    marker="o",
                    color=f"C{i}",
                    label=f"{heads}/{kv_heads} heads of {head_dim}, {name}",
                )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.axhline(1, color="0.5", linewidth=1)
        axes.set_xlabel("positions in the cache")
        axes.set_title(f"x faster than each peer, {count} thread{'s' * (count > 1)}")
        axes.legend(fontsize="x-small")
    facts = hardware.conditions()
    figure.suptitle(f"kv_cache_attention: {facts['cpu']}, {facts['isa']}, torch {facts['torch']}")
    figure.savefig(path, dpi=150)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _mean(values: Iterable[float]) -> float:
    return common.geometric_mean(list(values))
