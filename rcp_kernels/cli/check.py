"""``rcp-kernels check``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .. import extras
from ..hardware import choose_device
from .console import Device, Phases, write_json

if TYPE_CHECKING:
    from ..bench.card import Measured
    from ..check import Report

__all__ = ["EXAMPLES", "check"]

EXAMPLES = """Examples:

rcp-kernels check

rcp-kernels check --device cuda --bench --out results"""

_SECONDS = 240.0


def check(
    device: Device = None,
    bench: Annotated[
        bool, typer.Option("--bench", help="Also time the operators and a LLaMA-2-7B with random weights.")
    ] = False,
    seconds: Annotated[
        float | None,
        typer.Option(
            min=1.0,
            help=f"The budget of the timings of --bench in seconds; the default is {_SECONDS:.0f}. What it leaves out "
            "is listed. On the CPU a budget below 120 takes small shapes.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for check.json and check.md, and check.png with --bench.", file_okay=False),
    ] = None,
) -> None:
    """Check every operator and a small model on a device against the references. Exit status 1 if anything is wrong."""
    from ..check import check_device

    if seconds is not None and not bench:
        raise typer.BadParameter("--seconds applies only with --bench")
    where = choose_device(device)
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise typer.BadParameter(f"cannot create folder {out}: {error.strerror}") from None
    measured: list[Measured] = []
    with Phases() as progress:
        report = check_device(where, progress)
    _print_report(report)
    # The outcomes are on the disk before minutes of timing.
    _write(out, report, measured)
    if bench:
        from ..bench.card import measure_card

        with Phases() as progress:
            measured = measure_card(where, seconds or _SECONDS, progress)
        for section in measured:
            _print_section(section)
        _write(out, report, measured)
    if report.failed or any(section.error for section in measured):
        raise typer.Exit(1)


def _print_report(report: Report) -> None:
    """The summary, and below it every failure with its shape."""
    from ..check.report import COLUMNS

    style = {"fail": "red", "skipped": "dim"}
    _print_table(
        f"rcp-kernels check: {report.card['card']}",
        COLUMNS,
        [line.cells for line in report.lines],
        [style.get(line.status) for line in report.lines],
        right=COLUMNS[2:5],
    )
    for outcome in report.failed:
        _say(f"FAILED {outcome.op}, {outcome.case}: {outcome.note}")
    _say(report.verdict)


def _print_section(section: Measured) -> None:
    """The times of a section, and everything that has none."""
    titles, rows = section.cells()
    _print_table(section.title, titles, rows, [None] * len(rows), right=titles[1:])
    for line in section.remarks():
        _say(line)


def _print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], styles: Sequence[str | None], right: Any
) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in columns:
        table.add_column(escape(name), justify="right" if name in right else "left", no_wrap=name == columns[0])
    for cells, style in zip(rows, styles, strict=True):
        table.add_row(*map(escape, cells), style=style)
    _say(title)
    Console().print(table)


def _say(text: str) -> None:
    Console().print(text, markup=False, highlight=False, soft_wrap=True)


def _write(out: Path | None, report: Report, measured: Sequence[Measured]) -> None:
    """check.json and check.md, and the plot of what was timed."""
    if out is None:
        return
    from ..check.report import card_facts, markdown_table

    facts: dict[str, Any] = {}
    text = report.to_markdown()
    if measured:
        # Clocks just after the load, beside those before it.
        facts = {"bench": [section.to_dict() for section in measured], "card_after_bench": card_facts(report.device)}
        for section in measured:
            titles, rows = section.cells()
            remarks = "".join(f"- {line}\n" for line in section.remarks())
            text += f"\n## {section.title}\n\n{markdown_table(titles, rows)}\n\n{remarks}"
    write_json(out / "check.json", report.to_dict() | facts)
    (out / "check.md").write_text(text)
    if measured:
        if extras.EXTRAS["matplotlib"].found:
            from ..bench.card import write_plot

            write_plot(measured, report.card["card"], out / "check.png")
        else:
            _say("check.png was not written: matplotlib is not installed")
