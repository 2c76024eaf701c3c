"""The common part of the trained quantizers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..formats import check_bits, check_group_size, num_groups
from ..ops.clip_search import clip_search
from ..ops.quantize_weight import for_each_group

__all__ = ["GroupQuantizer"]


class GroupQuantizer(nn.Module):
    """Fake quantization of a weight [N, K] with trained parameters for each group of ``group_size`` weights along K.

    Attributes:
        bits: 2, 3 or 4.
        group_size: weights along K that share a table.
        weight_shape: (N, K).
    """

    def __init__(self, weight_shape: Sequence[int], bits: int, group_size: int) -> None:
        super().__init__()
        if len(weight_shape) != 2 or min(weight_shape) < 1:
            raise ValueError(
                f"{type(self).__name__}: weight_shape must be (out_features, in_features), both at least 1, got "
                f"{tuple(weight_shape)}; pass weight.shape"
            )
        self.weight_shape = (int(weight_shape[0]), int(weight_shape[1]))
        self.bits = check_bits(bits)
        self.group_size = check_group_size(group_size, self.weight_shape[1])
        self._groups_shape = (self.weight_shape[0], num_groups(self.weight_shape[1], group_size))

    def extra_repr(self) -> str:
        return f"weight_shape={self.weight_shape}, bits={self.bits}, group_size={self.group_size}"

    def _clip_ratios(self, weight: Tensor, importance: Tensor | None) -> Tensor:
        """Shares of each group's minimum and maximum, of least squared error: float32 [N, groups, 2]."""
        count = 2**self.bits
        return for_each_group(
            weight, self.group_size, lambda groups, share: clip_search(groups, count, share), importance
        )

    def _check(self, weight: Tensor) -> None:
        if tuple(weight.shape) != self.weight_shape:
            raise ValueError(
                f"{type(self).__name__}: weight must have the quantizer's shape {self.weight_shape}, got "
                f"{tuple(weight.shape)}; make a quantizer with weight.shape"
            )
