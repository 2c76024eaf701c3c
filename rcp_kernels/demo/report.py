"""What the demo found: the figures, and how they are shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

from .. import extras

__all__ = ["Calibrated", "Report", "Result", "plot", "table", "texts"]


@dataclass
class CalibratedResult:
    """What one format costs when its codes are chosen by calibration; seconds are those of rotating and quantizing."""

    name: str
    bits_per_weight: float
    perplexity: float
    text: str
    seconds: float = 0.0
    cpu_seconds: float = 0.0


@dataclass
class Calibrated:
    """A rotated model quantized by GPTQ; the results begin with the float model's.

    `windows` of `window` tokens of `text`, whose whole has this sha256, were calibrated on.
    """

    method: str
    rotation: str
    levels: str
    text: str
    sha256: str
    windows: int
    window: int
    prompt: str
    results: list[CalibratedResult] = field(default_factory=list)


@dataclass
class Result:
    """What one configuration costs. Bytes are those held in memory; seconds are wall clock."""

    name: str
    bits_per_weight: float
    linear_bytes: int
    model_bytes: int
    load_seconds: float
    swap_seconds: float
    perplexity: float = float("nan")
    seconds_per_token: float = float("nan")
    text: str = ""


@dataclass
class Report:
    """The demo's outcome: the conditions it was measured under, one Result per configuration, and what rotations do.

    `rotated` is the perplexity by configuration and then by rotation, "none" first. `calibrated` is None where that
    part was left out.
    """

    model: str
    group_size: int
    levels: str
    perplexity_tokens: int
    perplexity_window: int
    decode_prompt_tokens: int
    decode_new_tokens: int
    threads: int
    conditions: dict[str, Any]
    prompt: str
    results: list[Result] = field(default_factory=list)
    rotated: dict[str, dict[str, float]] = field(default_factory=dict)
    calibrated: Calibrated | None = None

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON types."""
        return asdict(self)


def table(report: Report) -> RenderableType:
    """The report as rich tables."""
    tables = [_configuration_table(report)]
    if report.rotated:
        tables.append(_rotation_table(report))
    if report.calibrated is not None:
        tables.append(_calibrated_table(report.calibrated, report.group_size))
    return Group(*(part for one in tables for part in (one, "")))


def texts(report: Report) -> str:
    """The prompts and what each configuration says to them, a line each."""
    parts: list[tuple[str, Sequence[Result | CalibratedResult]]] = [(report.prompt, report.results)]
    if report.calibrated is not None:
        parts.append((report.calibrated.prompt, report.calibrated.results))
    lines = []
    for prompt, results in parts:
        lines += ["", f'"{prompt}"']
        lines += [f"  {result.name:>10}: {' '.join(result.text.split())}" for result in results]
    return "\n".join(lines)


def _table(title: str, caption: str, headings: Sequence[str]) -> Table:
    """A column of names, and one of figures under each heading."""
    rows = Table(title=title, caption=caption, caption_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    rows.add_column("", no_wrap=True)
    for heading in headings:
        rows.add_column(heading, justify="right", no_wrap=True)
    return rows


def _configuration_table(report: Report) -> Table:
    conditions = report.conditions
    rows = _table(
        title=f"{report.model} on {conditions['cpu']}, {conditions['isa']}, {report.threads} threads",
        caption=(
            f"Perplexity: {report.perplexity_tokens} tokens of pydoc_data.topics (Python {conditions['python']}) in "
            f"windows of {report.perplexity_window}. Decode: median of {report.decode_new_tokens} tokens after "
            f"{report.decode_prompt_tokens}, same loop for all. W4A8, W3A8, W2A4: {report.levels} levels in groups of "
            f"{report.group_size} (576 = 9 x 64); embedding, lm_head and norms stay bf16. torch "
            f"{conditions['torch']}."
        ),
        headings=[
            "bits/\nweight",
            "linear\nMB",
            "model\nMB",
            "decode\ntokens/s",
            "x torch\nbf16",
            "load+swap\ns",
            "perplexity",
        ],
    )
    seconds = {result.name: result.seconds_per_token for result in report.results}
    for result in report.results:
        rows.add_row(
            result.name,
            f"{result.bits_per_weight:.3g}",
            f"{result.linear_bytes / 1e6:.1f}",
            f"{result.model_bytes / 1e6:.1f}",
            f"{1 / result.seconds_per_token:.1f}",
            f"{seconds['torch bf16'] / result.seconds_per_token:.2f}" if "torch bf16" in seconds else "-",
            f"{result.load_seconds:.0f}+{result.swap_seconds:.1f}",
            _perplexity_text(result.perplexity),
        )
    return rows


def _rotation_table(report: Report) -> Table:
    rows = _table(
        title="Perplexity with the input of every linear layer rotated, and its weight to match",
        caption=(
            f"Global mixes all features of a token; grouped, blocks of {report.group_size}, the weight's groups: there "
            f"natural and sequency order hold the same columns in each group, and give the same bits. Round to "
            f"nearest, no calibration: two bits a weight stay unusable without GPTQ or training."
        ),
        headings=[name.replace(" ", "\n") for name in next(iter(report.rotated.values()))],
    )
    for name, row in report.rotated.items():
        rows.add_row(name, *map(_perplexity_text, row.values()))
    return rows


def _calibrated_table(found: Calibrated, group_size: int) -> Table:
    rows = _table(
        title=f"{found.method.upper()} on the model rotated by {found.rotation.upper()}: calibrated, not trained",
        caption=(
            f"{found.windows} x {found.window} tokens of {found.text}, nothing of the text that is measured; "
            f"{found.levels} levels in groups of {group_size}; perplexity as above; all else stays fp32. "
            f"Quantizing includes the rotation, shared by all rows. Two bits need training: docs/rcp.md."
        ),
        headings=["bits/\nweight", "perplexity", "x torch\nfp32", "quantizing\ns", "of CPU\ns"],
    )
    for result in found.results:
        rows.add_row(
            result.name,
            f"{result.bits_per_weight:.3g}",
            _perplexity_text(result.perplexity),
            f"{result.perplexity / found.results[0].perplexity:.2f}",
            f"{result.seconds:.0f}",
            f"{result.cpu_seconds:.0f}",
        )
    return rows


def _perplexity_text(value: float) -> str:
    return f"{value:.2f}" if value < 1e4 else f"{value:.2e}"


def plot(report: Report, path: Path) -> None:
    """Write a PNG with three bar charts: memory of the linear layers, decode speed, perplexity (log scale)."""
    extras.require("matplotlib")
    from matplotlib.figure import Figure

    names = [result.name for result in report.results]
    colors = ["0.6" if name.startswith("torch") else "tab:blue" for name in names]
    panels: list[tuple[str, list[float], str]] = [
        ("linear weights, MB", [result.linear_bytes / 1e6 for result in report.results], "{:.0f}"),
        ("decode, tokens/s", [1 / result.seconds_per_token for result in report.results], "{:.0f}"),
        ("perplexity (log scale)", [result.perplexity for result in report.results], "{:.3g}"),
    ]
    figure = Figure(figsize=(12, 4), layout="constrained")
    for axes, (title, values, label) in zip(figure.subplots(1, 3), panels, strict=True):
        bars = axes.bar(names, values, color=colors)
        axes.bar_label(bars, [label.format(value) for value in values])
        axes.set_title(title)
        axes.tick_params(axis="x", rotation=30)
        axes.spines[["top", "right"]].set_visible(False)
    axes.set_yscale("log")
    figure.suptitle(f"{report.model}, {report.conditions['cpu']}, {report.threads} threads")
    figure.savefig(path, dpi=150)
