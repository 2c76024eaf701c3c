"""A description of a written model: the last lines of ``rcp-kernels quantize``, and fields of report.json."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..nn import StorageReport

__all__ = ["Summary"]


@dataclass(frozen=True)
class Summary:
    """A written model.

    Attributes:
        out: its directory.
        storage: its packed layers and its parameters in floating point.
        dtype: of the parameters in floating point.
        bytes_before: the float model's size in that dtype, with a tied head counted once.
        bytes_source: the size of the weight files that were read; None for a hub id.
        bytes_after: the size of the written weight files.
        bytes_untied: the size of an output head that was tied and has its own weight now; else 0.
        seconds, cpu_seconds: wall clock and CPU time of the whole command.
    """

    out: Path
    storage: StorageReport
    dtype: str
    bytes_before: int
    bytes_source: int | None
    bytes_after: int
    bytes_untied: int
    seconds: float
    cpu_seconds: float

    def fields(self) -> dict[str, Any]:
        """The fields of report.json. The path of the directory is left out: it may be moved."""
        storage = dataclasses.asdict(self.storage)
        storage.update(bits_per_weight=self.storage.bits_per_weight, float_share=self.storage.float_share)
        del storage["parts"]
        names = ("dtype", "bytes_before", "bytes_source", "bytes_untied", "seconds", "cpu_seconds")
        return {**{name: getattr(self, name) for name in names}, "storage": storage}

    def __str__(self) -> str:
        ratio = self.bytes_before / max(1, self.bytes_after)
        compared = f"{ratio:.2f} times smaller" if ratio >= 1 else f"{1 / ratio:.2f} times LARGER"
        read = "" if self.bytes_source is None else f"read {_size(self.bytes_source)}; "
        lines = [
            str(self.storage),
            f"{read}{_size(self.bytes_before)} as {self.dtype}, now {_size(self.bytes_after)}: {compared}",
        ]
        if self.bytes_untied:
            lines.append(
                f"the output head was tied to the embedding; after the rotation it has its own weight of "
                f"{_size(self.bytes_untied)}"
            )
        lines += [
            f"{self.seconds:.0f} s, {self.cpu_seconds:.0f} CPU seconds",
            f"wrote {self.out}",
            f"next: rcp-kernels eval {self.out}",
        ]
        return "\n".join(lines)


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 10**6 else f"{count / 1e3:.1f} kB"
