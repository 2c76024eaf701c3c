"""``rcp-kernels check``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from .console import Phases, write_json

if TYPE_CHECKING:
    from ..check import Report

__all__ = ["EXAMPLES", "check"]

EXAMPLES = """Examples:

rcp-kernels check

rcp-kernels check --device cuda --bench --out results"""

# A machine that is lent for ten minutes builds in one, checks in one, and tests in two.
_SECONDS = 300.0


def _device(name: str | None) -> str:
    """The device to check, by default the GPU. A device that is not there is wrong usage, exit status 2."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(name)
        module = torch.get_device_module(found)
    except RuntimeError:
        raise typer.BadParameter(
            f"--device must be a device that torch knows, such as cpu or cuda, got {name!r}"
        ) from None
    if not module.is_available() or (found.index or 0) >= module.device_count():
        raise typer.BadParameter(f"--device must be a device that torch sees, got {name!r}: there is no such GPU here")
    return name


def check(
    device: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            callback=_device,
            help="The device to check, such as cpu, cuda or cuda:1; the default is cuda where torch sees a GPU, else "
            "cpu.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for check.json and check.md.", file_okay=False, metavar="DIR")
    ] = None,
) -> None:
    """Check every operator and a small model on a device against the references. Exit status 1 if anything is wrong."""
    from ..check import check_device

    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    with Phases() as progress:
        report = check_device(_device(device), progress)
    _print(report)
    if out is not None:
        write_json(out / "check.json", report.to_dict())
        (out / "check.md").write_text(report.to_markdown())
    if report.failed:
        raise typer.Exit(1)


def _print(report: Report) -> None:
    """The summary, and below it every failure with its shape."""
    from ..check.report import COLUMNS

    console = Console()
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), title=f"rcp-kernels check: {report.card['card']}"
    )
    for title in COLUMNS:
        table.add_column(title, justify="right" if title in COLUMNS[2:5] else "left", no_wrap=title == COLUMNS[0])
    for line in report.lines:
        style = {"fail": "red", "pass": None, "skipped": "dim"}[line.status]
        table.add_row(*line.cells, style=style)
    console.print(table)
    for outcome in report.failed:
        console.print(f"FAILED {outcome.op}, {outcome.case}: {outcome.note}", markup=False, soft_wrap=True)
    console.print(report.verdict, markup=False, soft_wrap=True, highlight=False)
