"""Files of a training run: a checkpoint that is whole or the one before, and a log that continues."""

from __future__ import annotations

import csv
import json
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import torch

__all__ = ["LogFile", "load_state", "save_state", "write_curve"]

VERSION = 1


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a training state so that a kill or a full disk at any moment leaves the old file or the new one.

    Streamed to a temporary file beside it, flushed to the disk, then renamed: the state is never twice in memory.

    Args:
        path: in a directory that exists.
        state: tensors, numbers, strings, and lists and dictionaries of them.

    Raises:
        OSError: as writing does; what was there before is untouched.
    """
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            try:
                torch.save({"version": VERSION, **state}, file)
            except RuntimeError as error:
                # torch's zip writer reports a failed write as its own error, from the destructor of the archive.
                raise OSError(f"cannot write {path}: {error}; free space on the disk and resume") from error
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def load_state(path: Path) -> dict[str, Any]:
    """Read what :func:`save_state` wrote.

    Raises:
        ValueError: not such a file, damaged, or of a later version.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        version = state["version"]
    except (RuntimeError, KeyError, TypeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"resume: {path} must be a training state, got {type(error).__name__}; delete it to start anew"
        ) from None
    if version != VERSION:
        raise ValueError(
            f"resume: version of {path} must be {VERSION}, got {version}; resume with the rcp-kernels that wrote it"
        )
    return state


class LogFile:
    """One JSON object a line; on resume what was logged after the checkpoint is cut off, so no step is there twice."""

    def __init__(self, path: Path | None, lines: int = 0) -> None:
        """Keep the first ``lines`` lines of the file and append after them; None for no file."""
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


def write_curve(log: Path, out: Path) -> None:
    """The validation rows of a log as CSV: what was measured, against tokens trained."""
    rows = [row for row in map(json.loads, log.read_text().splitlines()) if row["kind"] == "validation"]
    fields = list(dict.fromkeys(key for row in rows for key in row if key != "kind"))
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
