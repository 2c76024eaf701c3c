"""The files of a training, a checkpoint and a log, and its clock."""

from __future__ import annotations

import contextlib
import csv
import json
import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..files import atomic_file

__all__ = ["Clock", "LogFile", "load_state", "save_state", "write_curve"]

VERSION = 1


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write tensors, numbers, strings, and lists and dictionaries of them, by ``atomic_file``.

    The state is streamed: memory does not hold a second copy.

    Raises:
        OSError: the file cannot be written; the old file is unchanged.
    """
    with atomic_file(path) as file:
        try:
            torch.save({"version": VERSION, **state}, file)
        except RuntimeError as error:
            # torch's zip writer turns a failed write into a RuntimeError.
            raise OSError(f"cannot write {path}: {error}; free space on the disk and resume") from error


def load_state(path: Path) -> dict[str, Any]:
    """Read a file of :func:`save_state`.

    Raises:
        ValueError: the file is no training state, is damaged, or has another version.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        version = state["version"]
    except (RuntimeError, KeyError, TypeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"resume: {path} must be a training state, got {type(error).__name__}; delete it to start over"
        ) from None
    if version != VERSION:
        raise ValueError(
            f"resume: version of {path} must be {VERSION}, got {version}; resume with the rcp-kernels that wrote it"
        )
    return state


class LogFile:
    """A log with one JSON object per line. On resume, lines after the checkpoint are cut off: no step occurs twice."""

    def __init__(self, path: Path | None, lines: int = 0) -> None:
        """Keep the first ``lines`` lines of the file and append after them. None writes no file."""
        self.path = path
        self.lines = lines
        if path is not None:
            old = path.read_text().splitlines(keepends=True)[:lines] if lines and path.exists() else []
            path.write_text("".join(old))
            self.lines = len(old)

    def write(self, row: dict[str, Any]) -> None:
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            self.lines += 1


class Clock:
    """Wall clock and CPU seconds of this process, from construction on, without pauses."""

    def __init__(self) -> None:
        self._seconds, self._cpu_seconds = -time.perf_counter(), -time.process_time()

    def add(self, seconds: float, cpu_seconds: float) -> None:
        """Add the time before a resume."""
        self._seconds += seconds
        self._cpu_seconds += cpu_seconds

    def fields(self) -> dict[str, float]:
        """``seconds`` and ``cpu_seconds``, for a log or a checkpoint."""
        return {
            "seconds": self._seconds + time.perf_counter(),
            "cpu_seconds": self._cpu_seconds + time.process_time(),
        }

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        before = self.fields()
        yield
        after = self.fields()
        self.add(before["seconds"] - after["seconds"], before["cpu_seconds"] - after["cpu_seconds"])


def write_curve(log: Path, out: Path) -> None:
    """Write the validation rows of a log as CSV."""
    rows = [row for row in map(json.loads, log.read_text().splitlines()) if row["kind"] == "validation"]
    fields = list(dict.fromkeys(key for row in rows for key in row if key != "kind"))
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
