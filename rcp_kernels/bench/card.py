"""Speed of a device in one run within a time budget: the linear layer, the transform, the cache, and decoding."""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import graph_decode, timing
from .decode import SHAPES
from .driver import Benchmark, Maker
from .kv_cache import SDPA_FP16, SDPA_FP32, CudaKVCache, KVCache
from .lut_linear import CUBLAS, LARGE_SHAPES, TORCH_FP32, CudaLutLinear, LutLinear
from .walsh_transform import MEMCPY, CudaWalshTransform, WalshTransform

__all__ = ["Measured", "Section", "measure_card", "plan", "write_plot"]

BATCHES = (1, 8, 32, 128, 512)
CUDA_WALSH_SIZES = (128, 4096, 11008, 14336)
CUDA_CACHES: dict[str, Any] = {"attentions": ((32, 32, 128), (32, 8, 128)), "contexts": (512, 2048, 8192)}
# Below this many seconds a CPU measures one small shape of each op: large shapes take a minute each.
_SMALL_BUDGET = 120.0
_SMALL_LINEAR = ((1024, 1024),)
# Bytes that a CPU's competitors cycle through. `rcp-kernels bench` takes four times the last-level cache instead, and
# minutes to fill it.
_SMALL_ROTATION, _ROTATION = 16 << 20, 128 << 20


@dataclass(frozen=True, kw_only=True)
class _Walsh(WalshTransform):
    """One variant and a copy. The other variants and peers are for `rcp-kernels bench`."""

    variants = ("sequency out",)
    peers = (MEMCPY,)

    def competitors(self) -> dict[str, Maker]:
        makers = super().competitors()
        return {name: makers[name] for name in (*self.variants, *self.peers)}


@dataclass(frozen=True, kw_only=True)
class _CudaWalsh(CudaWalshTransform):
    variants = ("sequency out",)
    peers = (MEMCPY,)


Progress = Callable[[str, int, int, str], None]


@dataclass(frozen=True)
class Section:
    """One part of the run.

    Attributes:
        title: what is measured.
        peer: the competitor that the plot compares with.
        cases: names of all cases, in the order in which `run` yields them.
        run: yields a name of `cases` with the name of ours and the seconds of each competitor, or a note.
        share: of the budget that is left when the section begins.
        axis: of the plot, or None for bars.
    """

    title: str
    peer: str
    cases: Sequence[str]
    run: Callable[[], Iterator[tuple[str, str, Mapping[str, float]] | str]]
    share: float


@dataclass
class Measured:
    """What a section measured.

    Attributes:
        title, peer: of the section.
        rows: per case: "case", "ours" and "us", microseconds by competitor, ours first.
        left_out: cases for which there was no time, or which followed an error.
        notes: what a competitor could not do.
        error: why ours failed, or None.
    """

    title: str
    peer: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return asdict(self)

    def remarks(self) -> list[str]:
        """An error of ours, what a competitor could not do, and the cases without a time."""
        lines = [f"FAILED {self.title}: {self.error}"] if self.error else []
        lines += self.notes
        if self.left_out:
            why = "after the error" if self.error else "for lack of time"
            lines.append(f"left out {why}, {len(self.left_out)} cases: {'; '.join(self.left_out)}")
        return lines

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Titles and rows of a table: case, us of ours, and the time of each other competitor in units of ours."""
        others = list(dict.fromkeys(name for row in self.rows for name in row["us"] if name != row["ours"]))
        rows = []
        for row in self.rows:
            ours = row["us"][row["ours"]]
            ratios = [f"{row['us'][name] / ours:.2f}" if name in row["us"] else "-" for name in others]
            rows.append([row["case"], f"{ours:.2f}", *ratios])
        return ["case", "us", *(f"x {name}" for name in others)], rows


def plan(device: torch.device, seconds: float) -> list[Section]:
    """The sections for a device, the most important first."""
    cpu, small = device.type == "cpu", seconds < _SMALL_BUDGET
    if cpu:
        sizes = _SMALL_LINEAR if small else LARGE_SHAPES
        common: dict[str, Any] = {"threads": (None,), "rounds": 3 if small else 7}
        batches = BATCHES[:2] if small else BATCHES
        linears: list[Benchmark] = [LutLinear(sizes=sizes, batches=batches, **common)]
        walsh: Benchmark = _Walsh(sizes=(4096,) if small else (4096, 11008), rows=(1, 128), **common)
        heads = ((9, 3, 64),) if small else ((32, 8, 128),)
        cache: Benchmark = KVCache(attentions=heads, contexts=(512,) if small else (512, 2048), **common)
    else:
        # Other devices than CUDA are timed by the clock of the CPU, and only show that the code works.
        sizes = LARGE_SHAPES if device.type == "cuda" else _SMALL_LINEAR
        linears = [
            CudaLutLinear(device=device, bits=bits, act_bits=act_bits, sizes=sizes, batches=BATCHES)
            for bits, act_bits in ((2, 4), (4, 8), (3, 16))
        ]
        walsh = _CudaWalsh(device=device, sizes=CUDA_WALSH_SIZES)
        cache = CudaKVCache(device=device, **CUDA_CACHES)
    return [
        _section(linears[0], TORCH_FP32 if cpu else CUBLAS, 0.3),
        _decoding(device, seconds),
        _section(walsh, MEMCPY, 0.3),
        _section(cache, SDPA_FP32 if cpu else SDPA_FP16, 0.4),
        *(_section(linear, CUBLAS, 0.6) for linear in linears[1:]),
    ]


def _section(benchmark: Benchmark, peer: str, share: float) -> Section:
    """The cases of a benchmark."""
    loads: Sequence[int | None] = benchmark.loads()
    product = itertools.product(benchmark.shapes(), loads, benchmark.variants)

    def run() -> Iterator[tuple[str, str, Mapping[str, float]] | str]:
        for found in benchmark.measure():
            if isinstance(found, str):
                yield found
                continue
            numbers = tuple(found.case[name] for name in benchmark.shape)
            load = found.case[benchmark.load] if benchmark.load else None
            ours = {found.ours: found.seconds[found.ours]}
            others = {name: value for name, value in found.seconds.items() if name not in benchmark.variants}
            yield _case_name(benchmark, numbers, load, found.ours), found.ours, ours | others

    cases = [_case_name(benchmark, *values) for values in product]
    return Section(benchmark.subject, peer, cases, run, share)


def _case_name(benchmark: Benchmark, shape: Sequence[int], load: int | None, variant: str) -> str:
    """``4096 x 4096, batch 8``."""
    name = " x ".join(map(str, shape))
    if len(shape) == 4:
        name = "{} heads on {} of {}, {} positions".format(*shape)
    if load is not None:
        name += f", {benchmark.load} {load}"
    return name if len(benchmark.variants) == 1 else f"{name}, {variant}"


def _decoding(device: torch.device, seconds: float) -> Section:
    cuda = device.type == "cuda"
    formats = ((2, 4, 16),) if device.type == "cpu" else ((2, 4, 16), (2, 4, 4), (4, 8, 16))
    if cuda or seconds >= _SMALL_BUDGET:
        layers = graph_decode.fitting_layers(device)
        shape: Mapping[str, int] = {**SHAPES["llama-2-7b"], "num_hidden_layers": layers}
        name = f"LLaMA-2-7B, {layers} of 32 layers"
    else:
        shape, name = graph_decode.SMALL_SHAPE, "a small LLaMA"
    cases = [f"{name}, {graph_decode.packed_name(*entry)}" for entry in formats]
    peer = "torch fp16" if cuda else "torch bf16"

    def run() -> Iterator[tuple[str, str, Mapping[str, float]] | str]:
        found = graph_decode.decode_seconds(shape, device, formats, new_tokens=50 if cuda else 8)
        reference, seconds_of_reference = next(found)
        for (ours, value), case in zip(found, cases, strict=True):
            yield case, ours, {ours: value, reference: seconds_of_reference}

    how = "one CUDA graph a token" if cuda else "eager steps"
    return Section(f"decoding at batch 1, random weights, {how}", peer, cases, run, 0.5)


def measure_card(
    device: torch.device, seconds: float, progress: Progress | None = None, sections: Sequence[Section] | None = None
) -> list[Measured]:
    """Measure every section within a time budget.

    A section stops at its share of the remaining time and leaves the rest to the next ones. The case that is being
    measured then is finished first.

    Args:
        device: any torch device; CUDA is timed by events on the device.
        seconds: the budget, above 0.
        progress: called after each case with the phase "bench", the cases done, their number, and the case.
        sections: of :func:`plan`; None makes them.

    Raises:
        ValueError: a budget that is not above 0.
    """
    if not seconds > 0 or math.isinf(seconds):
        raise ValueError(f"measure_card: seconds must be a finite number above 0, got {seconds}; pass a longer budget")
    start = time.monotonic()
    sections = plan(device, seconds) if sections is None else sections
    total = sum(len(section.cases) for section in sections)
    results: list[Measured] = []
    done = 0
    with timing.rotating(_SMALL_ROTATION if seconds < _SMALL_BUDGET else _ROTATION):
        for section in sections:
            now = time.monotonic()
            until = now + section.share * max(0.0, start + seconds - now)
            results.append(_measure(section, until, functools.partial(_report, progress, done, total)))
            done += len(section.cases)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return results


def _report(progress: Progress | None, before: int, total: int, done: int, text: str) -> None:
    if progress is not None:
        progress("bench", before + done, total, text)


def _measure(section: Section, until: float, report: Callable[[int, str], None]) -> Measured:
    """The cases of a section that there was time for. A failure of ours ends the section, and is an error."""
    result = Measured(section.title, section.peer)
    open_cases = list(section.cases)
    report(0, section.title)
    try:
        found = section.run()
        while open_cases and time.monotonic() < until:
            entry = next(found, None)
            if entry is None:
                break
            if isinstance(entry, str):
                result.notes.append(entry.removeprefix("# "))
                continue
            case, ours, times = entry
            open_cases.remove(case)
            us = {name: value * 1e6 for name, value in times.items()}
            result.rows.append({"case": case, "ours": ours, "us": us})
            report(len(result.rows), case)
    except Exception as error:  # a benchmark that fails is an answer too, and the next section is measured
        result.error = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    result.left_out = open_cases
    return result


def write_plot(results: Sequence[Measured], title: str, path: Path) -> None:
    """Write a PNG: a panel for each section, in it a bar for each case, the peer's time in units of ours."""
    from matplotlib.figure import Figure

    shown = [result for result in results if any(result.peer in row["us"] for row in result.rows)]
    if not shown:
        return
    count = max(len(result.rows) for result in shown)
    figure = Figure(figsize=(5.5 * len(shown), 1.5 + 0.28 * count), layout="constrained")
    for axes, result in zip(figure.subplots(1, len(shown), squeeze=False).flat, shown, strict=True):
        rows = [row for row in result.rows if result.peer in row["us"]]
        speedups = [row["us"][result.peer] / row["us"][row["ours"]] for row in rows]
        bars = axes.barh(range(len(rows)), speedups)
        axes.bar_label(bars, fmt="%.2f", fontsize="x-small", padding=2)
        axes.set_yticks(range(len(rows)), [row["case"] for row in rows], fontsize="x-small")
        axes.invert_yaxis()
        axes.axvline(1, color="0.5", linewidth=1)
        axes.margins(x=0.15)
        axes.set_xlabel(f"times as fast as {result.peer}")
        axes.set_title(result.title, fontsize="small", wrap=True)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
