"""What ``rcp-kernels quantize`` made, in a few lines at its end and as fields of report.json."""

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
        storage: what it stores.
        dtype: of what is not packed.
        bytes_before: of the float model in that dtype, a tied head counted once.
        bytes_source: of the weight files that were read; None where they are not on this machine's disk.
        bytes_after: of the written weight files.
        bytes_untied: of the output head, where the rotation gave it a weight of its own; else 0.
        seconds, cpu_seconds: of the whole command.
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
        """For report.json; the directory's own path is left out."""
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
                f"the output head has a weight of its own now, {_size(self.bytes_untied)}: it was tied to the "
                f"embedding before the rotation"
            )
        lines += [
            f"{self.seconds:.0f} s, {self.cpu_seconds:.0f} CPU seconds",
            f"wrote {self.out}",
            f"next: rcp-kernels eval {self.out}",
        ]
        return "\n".join(lines)


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 10**6 else f"{count / 1e3:.1f} kB"
