"""Runs a benchmark: measures every case, prints a row for each, and writes the rows as CSV and as a plot."""

from __future__ import annotations

import csv
import datetime
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from .. import extras, hardware
from . import timing
from .timing import CPU, Call

__all__ = ["Benchmark", "Maker", "Peer", "Row", "WrongResult", "dtype_name", "run", "without_threads"]


class WrongResult(RuntimeError):
    """A competitor computes something else than the op, so its time means nothing."""


@dataclass(frozen=True)
class Peer:
    """One competitor, its data built for one shape.

    Attributes:
        bind: makes the function to time from what :meth:`Benchmark.argument` returns.
        nbytes: bytes that a call moves.
        copies: copies of the data that calls cycle through.
    """

    bind: Callable[[Any], Call]
    nbytes: int = 0
    copies: int = 1


Maker = Callable[..., Peer | None]
"""Builds a competitor from the numbers of a shape. None: not installed, or not made for this shape."""


@dataclass(frozen=True)
class Row:
    """One measured case.

    Attributes:
        case: its parameters, by CSV column.
        ours: the name of the competitor that is measured against the others.
        nbytes: bytes that a call of ours moves.
        seconds: median seconds per call, by competitor. That of the roof is the time for nbytes.
    """

    case: Mapping[str, Any]
    ours: str
    nbytes: int
    seconds: Mapping[str, float]

    @property
    def bytes_per_second(self) -> float:
        return self.nbytes / self.seconds[self.ours]

    def speedup(self, peer: str | None) -> float | None:
        """The peer's time over ours. None where the peer was not measured."""
        return None if peer is None or peer not in self.seconds else self.seconds[peer] / self.seconds[self.ours]


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """An op on a device: the cases, the competitors, and how rows look.

    One subclass per op, and one per op for devices that are not the CPU. The latter has no parameter "threads".

    Attributes:
        device: to compute on.
        threads: sizes of torch's thread pool; None leaves the pool alone.
        rounds: turns of each competitor.
        op: the name of ours in the CSV.
        variants: names of our competitors. Each gets a row of its own.
        shape: names of a shape's numbers.
        titles: parameters of a printed line -> title, padded to the width of the column.
        groups: parameters that a line of the summary stands for.
        axis: the parameter on the plot's x-axis.
        bytes_column: CSV column of a row's nbytes; None leaves it out.
        roof: the competitor that only moves bytes. Its speedup is printed first.
        peers: competitors with a column of their own. Any others follow at the end of a line.
        us, rate: formats of the columns "us" and "GB/s".
        budget: seconds of timed calls per competitor and case.
    """

    device: torch.device = CPU
    threads: tuple[int | None, ...] = (1, 2)
    rounds: int = 15

    op: ClassVar[str]
    variants: ClassVar[tuple[str, ...]]
    shape: ClassVar[tuple[str, ...]]
    load: ClassVar[str | None] = None
    titles: ClassVar[Mapping[str, str]]
    groups: ClassVar[tuple[str, ...]]
    axis: ClassVar[str]
    bytes_column: ClassVar[str | None] = None
    roof: ClassVar[str | None] = None
    peers: ClassVar[tuple[str, ...]]
    us: ClassVar[str] = "9.1f"
    rate: ClassVar[str] = "6.1f"
    budget: ClassVar[float] = math.inf

    # What a subclass says.

    @property
    def stem(self) -> str:
        """Name of the files that :func:`run` writes, without suffix."""
        raise NotImplementedError

    @property
    def subject(self) -> str:
        """What is measured, for the first line and the plot."""
        raise NotImplementedError

    def comments(self) -> list[str]:
        """Further lines of the header."""
        return []

    def constants(self) -> dict[str, Any]:
        """CSV columns that are the same in every row."""
        return {}

    def details(self, *shape: int) -> dict[str, Any]:
        """CSV columns that follow from a shape."""
        return {}

    def variant_details(self, name: str) -> dict[str, Any]:
        """CSV columns that follow from one of `variants`."""
        return {}

    def shapes(self) -> Sequence[tuple[int, ...]]:
        """The shapes to measure, as numbers in the order of `shape`."""
        raise NotImplementedError

    def loads(self) -> Sequence[int | None]:
        """Values of the parameter `load`, each measured with every shape."""
        return (None,)

    def competitors(self) -> dict[str, Maker]:
        """Every competitor by name, ours first."""
        raise NotImplementedError

    def argument(self, shape: tuple[int, ...], load: int | None) -> Any:
        """What :attr:`Peer.bind` gets in a case: the load, unless competitors share an input."""
        return load

    def nbytes(self, ours: Peer, argument: Any) -> int:
        """Bytes that a call of ours moves."""
        return ours.nbytes

    def copies(self, peer: Peer, argument: Any) -> int:
        """Copies of the data that a peer's calls cycle through."""
        return peer.copies

    def timer(self, calls: Mapping[str, tuple[Call, int]], rounds: int) -> dict[str, float]:
        """Median seconds per call, by competitor: of CUDA graphs, or by the clock of the CPU on other devices."""
        if self.device.type == "cuda":
            return timing.graph_seconds(calls, rounds)
        alone = {name: call for name, (call, _) in calls.items()}
        return timing.median_seconds(alone, rounds, self.budget, self.device)

    # Measuring.

    def measure(self) -> Iterator[Row | str]:
        """Rows, and a note for each competitor that fails on a shape. The data of one shape is freed before the next.

        Raises:
            WrongResult: a competitor computes something else.
        """
        notes: set[str] = set()
        competitors = self.competitors()
        for shape in self.shapes():
            for found in self._measure_shape(competitors, shape):
                if isinstance(found, Row):
                    yield found
                elif found not in notes:
                    notes.add(found)
                    yield found

    def _measure_shape(self, competitors: Mapping[str, Maker], shape: tuple[int, ...]) -> Iterator[Row | str]:
        peers: dict[str, Peer] = {}
        with torch.inference_mode():
            for name, make in competitors.items():
                built = self._attempt(name, shape, make, *shape)
                if isinstance(built, str):
                    yield built
                elif built is not None:
                    peers[name] = built
        for threads, load in itertools.product(self.threads, self.loads()):
            with timing.torch_threads(threads), torch.inference_mode():
                argument = self.argument(shape, load)
                calls = {}
                for name, peer in peers.items():
                    call = self._attempt(name, shape, _bound, peer, argument)
                    if isinstance(call, str):
                        yield call
                    else:
                        calls[name] = call, self.copies(peer, argument)
                seconds = self.timer(calls, self.rounds)
            nbytes = self.nbytes(next(iter(peers.values())), argument)
            if self.roof in seconds:
                seconds[self.roof] *= nbytes / peers[self.roof].nbytes
            case: dict[str, Any] = {"threads": threads} if threads else {}
            case |= {self.load: load} if self.load else {}
            case |= dict(zip(self.shape, shape, strict=True)) | self.details(*shape)
            for name in self.variants:
                yield Row(case | self.variant_details(name), name, nbytes, seconds)

    def _attempt(self, name: str, shape: tuple[int, ...], step: Callable[..., Any], *arguments: Any) -> Any:
        """Result of a step. A note instead if another library fails: the run goes on without that competitor."""
        try:
            return step(*arguments)
        except WrongResult:
            raise
        except Exception as error:
            if name in self.variants:
                raise
            reason = (str(error).splitlines() or [""])[0]
            return f"# {name} cannot do {' x '.join(map(str, shape))}: {type(error).__name__}: {reason}"

    # Printing.

    def header(self) -> str:
        """What is measured and under which conditions, as comment lines."""
        facts = hardware.conditions()
        now = datetime.datetime.now().astimezone()
        lines = (
            self.subject,
            f"{facts['cpu']}, {facts['cpus']} CPUs, kernels use {facts['isa']}, "
            f"last-level cache {facts['last_level_cache_mb']:.0f} MB",
            f"torch {facts['torch']} ({facts['torch_cpu_capability']}), Python {facts['python']}, "
            f"{now:%Y-%m-%d %H:%M %Z}, medians of {self.rounds} rounds",
            *([] if self.device.type == "cpu" else [hardware.device_name(self.device)]),
            *self.comments(),
        )
        return "\n".join(f"# {line}" for line in lines)

    def heading(self) -> str:
        """The column titles of :meth:`line`."""
        names = [name for name in (self.roof, *self.peers) if name]
        width, rate_width = (int(form.split(".")[0]) for form in (self.us, self.rate))
        cells = [" ".join(self.titles.values()), f"{'us':>{width}}", f"{'GB/s':>{rate_width}}"]
        return " | ".join([*cells, *(f"x {name}" for name in names)])

    def line(self, row: Row) -> str:
        """A row as text. A competitor that was not measured is a dash."""
        cells = [" ".join(f"{row.case[name]:>{len(title)}}" for name, title in self.titles.items())]
        cells += [f"{row.seconds[row.ours] * 1e6:{self.us}}", f"{row.bytes_per_second / 1e9:{self.rate}}"]
        for name in (self.roof, *self.peers):
            if name:
                speedup = row.speedup(name)
                cells.append(f"{'-' if speedup is None else f'{speedup:.2f}':>{len(name) + 2}}")
        return " | ".join([*cells, *(f"{row.speedup(name):.2f} x {name}" for name in self._others(row))])

    def _others(self, row: Row) -> list[str]:
        """Competitors without a column."""
        return [name for name in row.seconds if name not in (*self.variants, self.roof, *self.peers)]

    def summary(self, rows: Sequence[Row]) -> str:
        """Geometric means over the shapes, one line for each value of `groups`."""
        lines = [self.summary_title()]
        keys = sorted({tuple(row.case[name] for name in self.groups) for row in rows})
        widths = [max(len(str(value)) for value in values) for values in zip(*keys, strict=True)]
        for key in keys:
            columns = zip(self.groups, key, widths, strict=True)
            text = " ".join(f"{name} {value:>{width}}" for name, value, width in columns)
            cases = [row for row in rows if tuple(row.case[name] for name in self.groups) == key]
            lines.append(f"{text}: {self.summary_text(cases)}")
        return "\n".join(lines)

    def summary_title(self) -> str:
        """The first line of the summary."""
        return "geometric means over the shapes; a peer's over those that it can do"

    def summary_text(self, rows: Sequence[Row]) -> str:
        """One line of the summary: the mean speedups over rows that differ only in their shape."""
        parts = []
        for name in (self.roof, *self.peers, *self._others(rows[0])):
            speedup = mean(row.speedup(name) for row in rows)
            if speedup is not None:
                parts.append(f"{speedup:.2f} {'of' if name == self.roof else 'x'} {name}")
        return ", ".join(parts)

    # Files.

    def write_csv(self, rows: Sequence[Row], path: Path) -> None:
        """Write a line per row: date, conditions, parameters, microseconds and speedups of every competitor."""
        lines = []
        for row in rows:
            line = self.constants() | dict(row.case)
            if self.device.type != "cpu":
                line["device"] = hardware.device_name(self.device)
            if self.bytes_column:
                line[self.bytes_column] = row.nbytes
            line |= {f"us {self.op}": row.seconds[row.ours] * 1e6, "gb_per_s": row.bytes_per_second / 1e9}
            if self.roof and self.roof in row.seconds:
                roof = self.roof.replace(" ", "_")
                line[f"{roof}_gb_per_s"] = row.nbytes / row.seconds[self.roof] / 1e9
                line[f"x_{roof}"] = row.speedup(self.roof)
            names = [name for name in row.seconds if name not in (*self.variants, self.roof)]
            line |= {f"us {name}": row.seconds[name] * 1e6 for name in names}
            line |= {f"x {name}": row.speedup(name) for name in names}
            lines.append(line)
        write_csv(lines, path)

    def plotted(self, rows: Sequence[Row]) -> Sequence[Row]:
        """The rows that the plot shows."""
        return rows

    def write_plot(self, rows: Sequence[Row], path: Path) -> None:
        """Write a PNG: a panel for each competitor and thread count, in it the speedup against `axis`."""
        extras.require("matplotlib")
        from matplotlib.figure import Figure

        rows = self.plotted(rows)
        names = [name for name in (self.roof, *self.peers) if any(row.speedup(name) for row in rows)]
        threads = list(dict.fromkeys(row.case.get("threads") for row in rows))
        series = [name for name in self.titles if name not in ("threads", self.axis)]
        figure = Figure(figsize=(4.5 * len(names), 4 * len(threads)), layout="constrained")
        panels = figure.subplots(len(threads), len(names), sharex=True, squeeze=False)
        for axes, (count, name) in zip(panels.flat, itertools.product(threads, names), strict=True):
            curves: dict[str, list[tuple[int, float | None]]] = {}
            for row in rows:
                if row.case.get("threads") == count:
                    label = " ".join(str(row.case[field]) for field in series)
                    curves.setdefault(label, []).append((row.case[self.axis], row.speedup(name)))
            for label, points in curves.items():
                found = sorted((x, y) for x, y in points if y is not None)
                axes.plot(*zip(*found, strict=True) if found else ((), ()), marker="o", markersize=3, label=label)
            axes.axhline(1, color="0.5", linewidth=1)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xlabel(self.axis)
            axes.set_title(f"x {name}" + (f", {count} threads" if count else ""))
        panels[0, 0].legend(title=" ".join(series), fontsize="x-small")
        facts = hardware.conditions()
        figure.suptitle(f"{self.subject}: {facts['cpu']}, {facts['isa']}, torch {facts['torch']}")
        figure.savefig(path, dpi=120)


def without_threads(titles: Mapping[str, str]) -> dict[str, str]:
    """The titles of a line on a device that has no threads."""
    return {name: title for name, title in titles.items() if name != "threads"}


def run(benchmark: Benchmark, out: Path | None = None) -> list[Row]:
    """Measure a benchmark and print every row as it comes. With out, a folder, also write CSV and PNG there."""
    print(benchmark.header())
    print(benchmark.heading(), flush=True)
    rows = []
    for row in benchmark.measure():
        print(row if isinstance(row, str) else benchmark.line(row), flush=True)
        if isinstance(row, Row):
            rows.append(row)
    print(benchmark.summary(rows))
    if out is not None:
        benchmark.write_csv(rows, out / f"{benchmark.stem}.csv")
        benchmark.write_plot(rows, out / f"{benchmark.stem}.png")
    return rows


def write_csv(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write lines after date and conditions. A column that a line lacks is empty; floats have five digits."""
    date = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    before = {"date": date} | hardware.conditions()
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys([*before, *(name for line in lines for name in line)])))
        writer.writeheader()
        for line in lines:
            writer.writerow(
                before | {name: f"{value:.5g}" if isinstance(value, float) else value for name, value in line.items()}
            )


def _bound(peer: Peer, argument: Any) -> Call:
    """The peer's call, after a first run, which compiles kernels and may refuse the shape."""
    call = peer.bind(argument)
    call(0)
    return call


def mean(values: Iterable[float | None]) -> float | None:
    """The geometric mean of the values that are not None. None without any."""
    logarithms = [math.log(value) for value in values if value is not None]
    return math.exp(sum(logarithms) / len(logarithms)) if logarithms else None


def dtype_name(dtype: torch.dtype) -> str:
    """float32 for torch.float32."""
    return str(dtype).removeprefix("torch.")
