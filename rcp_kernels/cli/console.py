"""Parts that the commands share: options, checks of files, and progress on standard error."""

from __future__ import annotations

import enum
import json
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..hardware import choose_device

__all__ = [
    "DType",
    "Device",
    "JsonPath",
    "ModelDType",
    "ModelName",
    "Phases",
    "Threads",
    "torch_dtype",
    "writable",
    "write_json",
]

# Seconds between two lines of progress where there is no terminal.
_LINE_EVERY = 10.0


class DType(str, enum.Enum):
    """A dtype of torch by name."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def torch_dtype(dtype: DType | None) -> torch.dtype | None:
    """The dtype of torch; None for None."""
    return None if dtype is None else getattr(torch, dtype.value)


def _check_device(ctx: typer.Context, name: str | None) -> str | None:
    """Refuse a device that is not there before a model is loaded. A dry run may be for another machine."""
    try:
        if not ctx.params.get("dry_run"):
            choose_device(name)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return name


def _set_threads(threads: int | None) -> int | None:
    if threads is not None:
        torch.set_num_threads(threads)
    return threads


def writable(path: Path | None) -> Path | None:
    """Refuse a file that cannot be written before minutes of measuring."""
    if path is not None:
        existed = path.exists()
        try:
            # Permissions do not show a read-only file system, or /proc to root. Opening the file does.
            path.open("ab").close()
        except OSError as error:
            raise typer.BadParameter(f"cannot write {path}: {error.strerror}") from None
        if not existed:
            path.unlink()
    return path


def write_json(path: Path | None, value: dict[str, Any]) -> None:
    """Write a result as JSON, if a path was given."""
    if path is not None:
        path.write_text(json.dumps(value, indent=2) + "\n")


ModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="The model: a directory that quantize wrote, a transformers directory, a hub id, a .gguf file, or demo.",
        show_default=False,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1, callback=_set_threads, help="Number of CPU threads; torch chooses without this option.", metavar="N"
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        callback=_check_device,
        help="The device to compute on, such as cpu, cuda or cuda:1; the default is cuda where torch sees a GPU, else "
        "cpu.",
    ),
]
ModelDType = Annotated[
    DType | None,
    typer.Option(
        help="The dtype of everything that is not packed; the default is float32 on the CPU, and elsewhere the dtype "
        "that the model is stored in."
    ),
]
JsonPath = Annotated[
    Path | None,
    typer.Option(
        "--json", callback=writable, dir_okay=False, help="Also write the result to this JSON file.", metavar="FILE"
    ),
]


class Phases:
    """Shows the progress of a pipeline on standard error: a bar for each phase, or plain lines without a terminal.

    Use it as a context manager, and pass it as ``progress``.
    """

    def __init__(self) -> None:
        self._console = Console(file=sys.stderr)
        self._bars = Progress(
            TextColumn("{task.description:<44}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._tasks: dict[str, Any] = {}
        self._began: dict[str, float] = {}
        self._said = -_LINE_EVERY

    def __enter__(self) -> Phases:
        if self._console.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._console.is_terminal:
            self._bars.stop()

    def __call__(self, phase: str, done: int, total: int, text: str) -> None:
        """Show that ``done`` of ``total`` units of a phase are done; a phase "validation" or a total of 0 is a line."""
        if phase == "validation":
            self._say(f"step {done}: {text}")
        elif total == 0:
            self._say(f"{phase}: {text}")
        elif self._console.is_terminal:
            if phase not in self._tasks:
                self._tasks[phase] = self._bars.add_task(phase, total=total)
            description = f"{phase}: {text}" if text else phase
            self._bars.update(self._tasks[phase], completed=done, total=total, description=description)
        else:
            self._line(phase, done, total, text)

    def _line(self, phase: str, done: int, total: int, text: str) -> None:
        now = time.monotonic()
        first = phase not in self._began
        seconds = now - self._began.setdefault(phase, now)
        if total == 1:
            self._say(f"{phase}: {'done' if done else text}")
        elif first or done >= total or now - self._said >= _LINE_EVERY:
            self._said = now
            left = f", about {seconds * (total - done) / done:.0f} s left" if seconds and 0 < done < total else ""
            self._say(f"{phase}: {done} of {total}{left}{f' ({text})' if text else ''}")

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
