"""Outputs of modules, kept between passes over the calibration text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

__all__ = ["KeptOutputs"]


class KeptOutputs:
    """Outputs by module name and batch, up to a number of bytes.

    Attributes:
        batch: number of the current batch.
    """

    def __init__(self, limit: int) -> None:
        """Keep at most ``limit`` bytes."""
        self.batch = 0
        self._room = limit
        self._kept: dict[tuple[str, int], tuple[Any, Tensor, int]] = {}

    def get(self, name: str) -> Any:
        """The output of a module for the current batch, or None if it was not kept or was changed in place."""
        output, tensor, version = self._kept.get((name, self.batch), (None, None, 0))
        return output if tensor is not None and tensor._version == version else None

    def keep(self, name: str, output: Any) -> None:
        """Keep a module's output: a tensor, or a tuple of a tensor and entries that are small or None."""
        self.drop([name])
        tensor = output[0] if isinstance(output, tuple) else output
        if isinstance(tensor, Tensor) and tensor.nbytes <= self._room:
            self._room -= tensor.nbytes
            self._kept[name, self.batch] = output, tensor, tensor._version

    def drop(self, names: Iterable[str]) -> None:
        """Drop the outputs of these modules for the current batch."""
        for name in names:
            entry = self._kept.pop((name, self.batch), None)
            if entry is not None:
                self._room += entry[1].nbytes
