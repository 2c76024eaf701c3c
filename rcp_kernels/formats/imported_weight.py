"""A weight read from another library's layout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .packed_weight import PackedWeight

__all__ = ["ImportedWeight"]


@dataclass(frozen=True)
class ImportedWeight:
    """A weight that :mod:`rcp_kernels.integrations.importers` read; ``QuantLinear.from_imported`` makes a layer of it.

    Attributes:
        weight: in format version 1.
        error: largest distance of a weight from its source, relative to the largest weight of its group (for an integer
            grid, the largest level). 0.0 means that every value is exact.
        permutation: int64 [K] or None. With a permutation the columns of a group are not neighbours in the source
            (act-order). ``weight`` is then for reordered inputs, ``x[..., permutation]``.
        bias: floating point [N] or None.
    """

    weight: PackedWeight
    error: float
    permutation: Tensor | None = None
    bias: Tensor | None = None

    def dequantize(self) -> Tensor:
        """The weight as float32 [N, K], its columns in the order of the source."""
        weight = self.weight.dequantize()
        if self.permutation is None:
            return weight
        return torch.empty_like(weight).index_copy_(1, self.permutation, weight)


# torch.load(weights_only=True), the default, builds only the classes in its list.
torch.serialization.add_safe_globals([ImportedWeight])
