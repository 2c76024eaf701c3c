"""walsh_transform against memcpy, a dense product, a butterfly in torch and packages from PyPI, all in one run."""

from __future__ import annotations

import ctypes
import importlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import extras, hardware, ops
from ..ops.walsh_matrices import base_matrix, factor_size, hadamard_matrix
from . import common

# Powers of two, and the m * 2^k among the widths of SmolLM2, LLaMA 2 and LLaMA 3.
SIZES = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 576, 1536, 11008, 14336)
ROWS = (1, 16, 128, 512)
THREADS = (1, 2)
ORDERS = ("natural", "sequency")

MEMCPY = "memcpy"
DENSE = "dense matmul"
BUTTERFLY = "torch butterfly"
HADAMARD_TRANSFORM = "hadamard-transform"
PYFWHT = "pyfwht"
PEERS = (DENSE, BUTTERFLY, HADAMARD_TRANSFORM, PYFWHT)

# Seconds of timed calls for each competitor and case: a dense product of 16384 takes seconds, the transform none.
_BUDGET = 1.0

# The largest relative error that passes for a transform, in units of the dtype's precision. Another order of the rows
# would be off by 1.4 in all.
_CHECKED_ROWS = 4
_TOLERANCE = 64


@dataclass(frozen=True)
class Options:
    """What is measured: x is [rows, size], transformed out of place and in place."""

    dtype: torch.dtype = torch.float32
    sizes: tuple[int, ...] = SIZES
    rows: tuple[int, ...] = ROWS
    threads: tuple[int, ...] = THREADS
    orders: tuple[str, ...] = ORDERS
    rounds: int = 15


@dataclass(frozen=True)
class Peer:
    """One way to transform x [rows, size] along its last dimension.

    `bind(x)` gives the function to time; it takes a call number, for which none of them has a use, and returns the
    transform of x: times `factor` where that is not the orthonormal one, in the row order `order` (None: no transform).
    A peer that `grows` works in place without normalizing: its numbers overflow unless x is zero.
    """

    name: str
    bind: Callable[[Tensor], Callable[[int], Tensor]]
    order: str | None = "natural"
    factor: float = 1.0
    grows: bool = False


@dataclass
class Row:
    """Result of one case; `seconds` holds every competitor by name, per call, the other orders and places included."""

    threads: int
    rows: int
    size: int
    order: str
    inplace: bool
    tensor_bytes: int
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def ours(self) -> float:
        """Seconds of walsh_transform."""
        return self.seconds[ours_name(self.order, self.inplace)]

    @property
    def bytes_per_second(self) -> float:
        """x read once and written once."""
        return 2 * self.tensor_bytes / self.ours

    def speedup(self, peer: str) -> float | None:
        return self.seconds[peer] / self.ours if peer in self.seconds else None

    @property
    def of_memcpy(self) -> float:
        """Speed as a share of memcpy's."""
        return self.seconds[MEMCPY] / self.ours


def ours_name(order: str, inplace: bool) -> str:
    """The competitor's name for walsh_transform in that order and place."""
    return f"{order} {_place(inplace)}"


def our_peer(order: str, inplace: bool) -> Peer:
    """rcp_kernels.walsh_transform as a user calls it, the Python function included. Out of place it allocates y."""

    def bind(x: Tensor) -> Callable[[int], Tensor]:
        if inplace:
            own = x.clone()
            return lambda i: ops.walsh_transform(own, order, inplace=True)
        return lambda i: ops.walsh_transform(x, order)

    return Peer(ours_name(order, inplace), bind, order)


def memcpy_peer() -> Peer:
    """The roof: copying x into a tensor that is already there."""

    def bind(x: Tensor) -> Callable[[int], Tensor]:
        y = torch.empty_like(x).zero_()
        return lambda i: y.copy_(x)

    return Peer(MEMCPY, bind, order=None)


def dense_peer(size: int, dtype: torch.dtype) -> Peer | None:
    """The product with the matrix; None where memory does not hold it."""
    available = hardware.memory_available_bytes()
    # int8, twice while it is made, and then float32 and dtype side by side
    if available is not None and 10 * size**2 > available:
        return None
    matrix = hadamard_matrix(size).float().mul_(size**-0.5).to(dtype)
    return Peer(DENSE, lambda x: lambda i: F.linear(x, matrix))


def butterfly_peer(size: int, dtype: torch.dtype) -> Peer:
    """log2(2^k) passes over x in plain torch, and for m > 1 a product with the m x m matrix."""
    m, power = factor_size(size, BUTTERFLY)
    base = base_matrix(m).to(dtype) if m > 1 else None

    def transform(x: Tensor) -> Tensor:
        stride = 1
        y = x
        while stride < power:
            first, second = y.view(-1, 2, stride).unbind(1)
            y = torch.stack((first + second, first - second), dim=1)
            stride *= 2
        if base is not None:
            y = base @ y.view(-1, m, power)
        return y.view(x.shape) * size**-0.5

    return Peer(BUTTERFLY, lambda x: lambda i: transform(x))


def hadamard_transform_peer(size: int) -> Peer | None:
    """The PyPI package hadamard-transform, plain torch as well; None without it, or if size is not a power of two."""
    if not _is_power_of_two(size) or not extras.EXTRAS["hadamard_transform"].found:
        return None
    transform = importlib.import_module("hadamard_transform").hadamard_transform
    return Peer(HADAMARD_TRANSFORM, lambda x: lambda i: transform(x))


def pyfwht_peer(size: int) -> Peer | None:
    """The PyPI package pyfwht, in C; None without it, or if size is not a power of two.

    In float64, the one float type for which it has a CPU kernel, in place, and not normalized. Several rows go through
    its batch function, with torch's number of threads; one row takes its single-threaded kernel, because starting
    OpenMP tasks costs more than so small a transform.
    """
    if not _is_power_of_two(size) or not extras.EXTRAS["pyfwht"].found:
        return None
    pyfwht = importlib.import_module("pyfwht")

    def bind(x: Tensor) -> Callable[[int], Tensor]:
        if pyfwht.has_openmp():
            # It offers no other way to say so. The library may or may not share torch's OpenMP.
            ctypes.CDLL(pyfwht._pyfwht.__file__).omp_set_num_threads(torch.get_num_threads())
        y = x.to(torch.float64, copy=True)
        rows = list(y.numpy())

        def one(i: int) -> Tensor:
            pyfwht.transform(rows[0], pyfwht.Backend.CPU)
            return y

        def many(i: int) -> Tensor:
            pyfwht.vectorized_batch_f64(rows, size)
            return y

        return one if len(rows) == 1 else many

    return Peer(PYFWHT, bind, factor=size**0.5, grows=True)


def builders(options: Options) -> dict[str, Callable[[int], Peer | None]]:
    """What makes each competitor for a size, by name, ours first; it returns None where the peer cannot take part."""
    ours = {
        ours_name(order, inplace): lambda size, order=order, inplace=inplace: our_peer(order, inplace)
        for order, inplace in itertools.product(options.orders, (False, True))
    }
    return ours | {
        MEMCPY: lambda size: memcpy_peer(),
        DENSE: lambda size: dense_peer(size, options.dtype),
        BUTTERFLY: lambda size: butterfly_peer(size, options.dtype),
        HADAMARD_TRANSFORM: hadamard_transform_peer,
        PYFWHT: pyfwht_peer,
    }


def bind_checked(peer: Peer, x: Tensor) -> Callable[[int], Tensor]:
    """The function to time for x [rows, size], after its first rows have been compared with the float64 reference.

    Raises:
        RuntimeError: the peer computes something else.
    """
    if peer.order is not None:
        y = peer.bind(x)(0)[:_CHECKED_ROWS].double() / peer.factor
        expected = ops.reference.walsh_transform(x[:_CHECKED_ROWS], peer.order)
        error = ((y - expected).norm() / expected.norm()).item()
        if not error <= _TOLERANCE * torch.finfo(x.dtype).eps:
            raise RuntimeError(
                f"{peer.name} does not compute the {peer.order}-order transform of size {x.shape[-1]}: its relative "
                f"error is {error:.2g}"
            )
    return peer.bind(torch.zeros_like(x) if peer.grows else x)


def measure(options: Options) -> Iterator[Row]:
    """Measure every case, size by size. All orders and places of one case and its peers take turns in one run."""
    for size in options.sizes:
        competitors = [peer for build in builders(options).values() if (peer := build(size)) is not None]
        for threads, rows in itertools.product(options.threads, options.rows):
            with common.torch_threads(threads), torch.inference_mode():
                x = torch.randn(rows, size).to(options.dtype)
                calls = {peer.name: bind_checked(peer, x) for peer in competitors}
                seconds = common.median_seconds(calls, options.rounds, _BUDGET)
            for order, inplace in itertools.product(options.orders, (False, True)):
                yield Row(threads, rows, size, order, inplace, x.nbytes, seconds)


def header(options: Options) -> str:
    """The conditions, as comment lines."""
    peers = []
    for module in ("hadamard_transform", "pyfwht"):
        extra = extras.EXTRAS[module]
        peers.append(
            f"{extra.distribution} {extra.version}"
            if extra.found
            else f"{extra.distribution} not installed: {extra.install}"
        )
    return "\n".join(
        (
            common.header(
                f"walsh_transform of {_name(options.dtype)} [rows, n] along n, through the Python function",
                "x is the same in every call: a small one stays in cache",
                options.rounds,
            ),
            "# memcpy: copy_ into a tensor that is there; out of place, walsh_transform allocates its result",
            f"# peers in natural order, beside sequency order too (they have no other): {'; '.join(peers)} (float64)",
        )
    )


def titles() -> str:
    """The column titles of `line`."""
    return (
        f"{'threads':>7} {'rows':>4} {'n':>6} {'order':>8} {'place':>5} | {'us':>9} | {'GB/s':>6} | "
        f"{'x of memcpy':>11} | {'x dense matmul':>14} | {'x torch butterfly':>17} | "
        f"{'x hadamard-transform (PyPI)':>27} | {'x pyfwht':>8}"
    )


def line(row: Row) -> str:
    """One case's result."""
    text = (
        f"{row.threads:>7} {row.rows:>4} {row.size:>6} {row.order:>8} {_place(row.inplace):>5} | "
        f"{row.ours * 1e6:>9.1f} | {row.bytes_per_second / 1e9:>6.1f} | {row.of_memcpy:>11.2f}"
    )
    for name, width in zip(PEERS, (14, 17, 27, 8), strict=True):
        speedup = row.speedup(name)
        text += f" | {'-' if speedup is None else f'{speedup:.2f}':>{width}}"
    return text


def summary(rows: Sequence[Row]) -> str:
    """Geometric means over all sizes, for each peer over those it can do; one line for each thread and row count."""
    order = rows[-1].order
    lines = [f"geometric means over the sizes, peers against {ours_name(order, inplace=False)}, over those they can do"]
    for threads, count in sorted({(row.threads, row.rows) for row in rows}):
        cases = [row for row in rows if (row.threads, row.rows) == (threads, count)]
        variants = list(dict.fromkeys((row.order, row.inplace) for row in cases))
        text = f"threads {threads} rows {count:>3}: of memcpy "
        text += ", ".join(
            f"{_mean(row.of_memcpy for row in cases if (row.order, row.inplace) == variant):.2f} {ours_name(*variant)}"
            for variant in variants
        )
        ours = [row for row in cases if (row.order, row.inplace) == (order, False)]
        for name in PEERS:
            speedups = [speedup for row in ours if (speedup := row.speedup(name)) is not None]
            if speedups:
                text += f"; {_mean(speedups):.1f} x {name}"
        lines.append(text)
    return "\n".join(lines)


def write_csv(rows: Sequence[Row], options: Options, path: Path) -> None:
    """Write one line per case: the conditions, all times in microseconds, and the derived columns."""
    lines = []
    for row in rows:
        peers = [name for name in (MEMCPY, *PEERS) if name in row.seconds]
        line: dict[str, Any] = {
            "dtype": _name(options.dtype),
            "threads": row.threads,
            "rows": row.rows,
            "size": row.size,
            "order": row.order,
            "place": _place(row.inplace),
            "us walsh_transform": row.ours * 1e6,
            "gb_per_s": row.bytes_per_second / 1e9,
        }
        line |= {f"us {name}": row.seconds[name] * 1e6 for name in peers}
        line |= {f"x {name}": row.speedup(name) for name in peers}
        lines.append(line)
    common.write_csv(lines, path)


def write_plot(rows: Sequence[Row], options: Options, path: Path) -> None:
    """Write a PNG: the share of memcpy against n for each thread count, and the speedup over each peer.

    Powers of two are joined by lines, other sizes are points.
    """
    extras.require("matplotlib")
    from matplotlib.figure import Figure

    order = options.orders[-1]
    threads = sorted({row.threads for row in rows})
    counts = sorted({row.rows for row in rows})
    figure = Figure(figsize=(5.5 * (len(threads) + 1), 4.2), layout="constrained")
    *panels, last = figure.subplots(1, len(threads) + 1)
    for axes, pool in zip(panels, threads, strict=True):
        for i, count in enumerate(counts):
            for inplace in (False, True):
                series = [
                    row
                    for row in rows
                    if (row.threads, row.rows, row.order, row.inplace) == (pool, count, order, inplace)
                ]
                _draw(
                    axes,
                    {row.size: row.of_memcpy for row in series},
                    color=f"C{i}",
                    linestyle="--" if inplace else "-",
                    label=f"{count} row{'s' * (count > 1)}{', in place' * inplace}",
                )
        axes.set_title(f"x of memcpy, {order} order, {pool} thread{'s' * (pool > 1)}")
    pool, count = threads[-1], counts[-1]
    for i, name in enumerate(PEERS):
        points = {
            row.size: speedup
            for row in rows
            if (row.threads, row.rows, row.order, row.inplace) == (pool, count, order, False)
            and (speedup := row.speedup(name)) is not None
        }
        if points:
            _draw(last, points, color=f"C{i}", linestyle="-", label=name)
    last.set_yscale("log")
    last.set_title(f"x faster than each peer, {count} row{'s' * (count > 1)}, {pool} thread{'s' * (pool > 1)}")
    for axes in (*panels, last):
        axes.axhline(1, color="0.5", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("n")
        axes.legend(fontsize="small")
    facts = hardware.conditions()
    figure.suptitle(f"walsh_transform {_name(options.dtype)}: {facts['cpu']}, {facts['isa']}, torch {facts['torch']}")
    figure.savefig(path, dpi=150)


def _draw(axes: Any, points: dict[int, float], color: str, linestyle: str, label: str) -> None:
    powers = sorted(size for size in points if _is_power_of_two(size))
    others = [size for size in points if not _is_power_of_two(size)]
    values = [points[size] for size in powers]
    axes.plot(powers, values, marker="o", markersize=3, color=color, linestyle=linestyle, label=label)
    hollow = "none" if linestyle == "--" else color
    axes.plot(others, [points[size] for size in others], "s", markersize=5, color=color, markerfacecolor=hollow)


def _place(inplace: bool) -> str:
    return "in" if inplace else "out"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_power_of_two(size: int) -> bool:
    return size & (size - 1) == 0


def _mean(values: Iterable[float]) -> float:
    return common.geometric_mean(list(values))
