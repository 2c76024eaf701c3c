"""The results of the demo, and the tables and the plot that show them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

from .. import extras

__all__ = ["Report", "Result", "plot", "table", "texts"]


@dataclass
class Result:
    """The cost and the quality of one configuration.

    Attributes:
        name: of the configuration.
        bits_per_weight: of the linear layers as stored.
        linear_bytes, model_bytes: held in memory by the linear layers and by the whole model.
        swap_seconds, cpu_seconds: wall clock and CPU time of rotating, quantizing and casting.
        perplexity: of the held-out text.
        seconds_per_token: median of a decode step, wall clock; 0 if not measured.
        text: the greedy answer to a prompt.
    """

    name: str
    bits_per_weight: float
    linear_bytes: int
    model_bytes: int
    swap_seconds: float
    cpu_seconds: float
    perplexity: float = float("nan")
    seconds_per_token: float = 0.0
    text: str = ""


@dataclass
class Report:
    """The results of the demo and the conditions that they were measured under.

    Attributes:
        results: the first table, one Result for each configuration.
        rotated: perplexity by configuration and rotation.
        calibrated: the third table, whose first row is the float model; empty if that part was left out.
    """

    model: str
    perplexity_tokens: int
    perplexity_window: int
    decode_prompt_tokens: int
    decode_new_tokens: int
    load_seconds: float
    threads: int
    conditions: dict[str, Any]
    prompt: str
    long_prompt: str
    calibration_windows: int
    calibration_window: int
    results: list[Result] = field(default_factory=list)
    rotated: dict[str, dict[str, float]] = field(default_factory=dict)
    calibrated: list[Result] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON types."""
        return asdict(self)


def table(report: Report) -> RenderableType:
    """The report as rich tables."""
    tables = [_configuration_table(report)]
    if report.rotated:
        tables.append(_rotation_table(report))
    if report.calibrated:
        tables.append(_calibrated_table(report))
    return Group(*(part for one in tables for part in (one, "")))


def texts(report: Report) -> str:
    """The prompts, and the answer of each configuration in a line."""
    lines = []
    for prompt, results in ((report.prompt, report.results), (report.long_prompt, report.calibrated)):
        if results:
            lines += ["", f'"{prompt}"', *(f"  {one.name:>10}: {' '.join(one.text.split())}" for one in results)]
    return "\n".join(lines)


def _table(title: str, caption: str, headings: Sequence[str]) -> Table:
    """An empty table: a column of names, and a column of numbers for each heading."""
    rows = Table(title=title, caption=caption, caption_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    rows.add_column("", no_wrap=True)
    for heading in headings:
        rows.add_column(heading, justify="right", no_wrap=True)
    return rows


def _configuration_table(report: Report) -> Table:
    conditions = report.conditions
    rows = _table(
        title=f"{report.model} on {_machine(report)}",
        caption=(
            f"Perplexity: {report.perplexity_tokens} tokens of pydoc_data.topics (Python {conditions['python']}) in "
            f"windows of {report.perplexity_window}. Decode: median of {report.decode_new_tokens} tokens after "
            f"{report.decode_prompt_tokens}, same loop for all. W4A8, W3A8, W2A4: kmeans levels in groups of 64 "
            f"(576 = 9 x 64); embedding, lm_head and norms stay bf16. torch {conditions['torch']}."
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
            f"{report.load_seconds:.0f}+{result.swap_seconds:.1f}",
            _perplexity_text(result.perplexity),
        )
    return rows


def _rotation_table(report: Report) -> Table:
    rows = _table(
        title="Perplexity of the rotated model",
        caption=(
            "hadamard and walsh mix all features of a token, gsr blocks of 64, the weight's groups. Round to nearest, "
            "no calibration: two bits a weight stay unusable without GPTQ or training."
        ),
        headings=list(next(iter(report.rotated.values()))),
    )
    for name, row in report.rotated.items():
        rows.add_row(name, *map(_perplexity_text, row.values()))
    return rows


def _calibrated_table(report: Report) -> Table:
    rows = _table(
        title="GPTQ on the model rotated by GSR: calibrated, not trained",
        caption=(
            f"{report.calibration_windows} x {report.calibration_window} tokens of the standard library's docstrings, "
            f"nothing of the text that is measured; kmeans levels in groups of 64; perplexity as above; all else stays "
            f"fp32. Quantizing includes the rotation. Two bits need training: docs/rcp.md."
        ),
        headings=["bits/\nweight", "perplexity", "x torch\nfp32", "quantizing\ns", "of CPU\ns"],
    )
    for result in report.calibrated:
        rows.add_row(
            result.name,
            f"{result.bits_per_weight:.3g}",
            _perplexity_text(result.perplexity),
            f"{result.perplexity / report.calibrated[0].perplexity:.2f}",
            f"{result.swap_seconds:.0f}",
            f"{result.cpu_seconds:.0f}",
        )
    return rows


def _machine(report: Report) -> str:
    """What measured: the device that is not the CPU, or the CPU with its instruction set and threads."""
    found = report.conditions
    return str(found.get("device") or f"{found['cpu']}, {found['isa']}, {report.threads} threads")


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
    figure.suptitle(f"{report.model}, {_machine(report)}")
    figure.savefig(path, dpi=150)
