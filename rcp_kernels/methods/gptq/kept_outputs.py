"""Outputs of modules, kept from one pass over the calibration text to the next."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

__all__ = ["KeptOutputs"]


class KeptOutputs:
    """Outputs by name and batch, as long as there is room for them; the others are computed again.

    Attributes:
        batch: number of the batch that runs now.
    """

    def __init__(self, limit: int) -> None:
        """Keep at most ``limit`` bytes."""
        self.batch = 0
        self._room = limit
        self._kept: dict[tuple[str, int], tuple[Any, Tensor, int]] = {}

    def get(self, name: str) -> Any:
        """The output of this name and batch, or None. One that somebody has changed in place is not returned."""
        output, tensor, version = self._kept.get((name, self.batch), (None, None, 0))
        return output if tensor is not None and tensor._version == version else None

    def keep(self, name: str, output: Any) -> None:
        """Keep a tensor, or a tuple of which the first entry is one and the others are small or None."""
        self.drop([name])
        tensor = output[0] if isinstance(output, tuple) else output
        if isinstance(tensor, Tensor) and tensor.nbytes <= self._room:
            self._room -= tensor.nbytes
            self._kept[name, self.batch] = output, tensor, tensor._version

    def drop(self, names: Iterable[str]) -> None:
        """Forget the outputs of this batch under these names."""
        for name in names:
            entry = self._kept.pop((name, self.batch), None)
            if entry is not None:
                self._room += entry[1].nbytes
