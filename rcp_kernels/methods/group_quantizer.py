"""The common part of the trained quantizers, and the application of a level search to all groups of a weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..formats import check_bits, check_group_size, num_groups
from ..ops.clip_search import clip_search
from ..ops.quantize_weight import whole_and_tail

__all__ = ["GroupQuantizer", "for_each_group"]

# On the CPU, bounds the copies of the weights and of their importance.
_CHUNK_WEIGHTS = 1 << 20


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


def for_each_group(
    weight: Tensor,
    group_size: int,
    choose: Callable[[Tensor, Tensor | None], Tensor],
    importance: Tensor | None = None,
) -> Tensor:
    """Apply ``choose`` to all groups of a weight, in chunks of rows.

    Args:
        weight: floating point [N, K].
        group_size: weights along K per group; the last group of a row may be shorter.
        choose: (groups float32 [C, length], importance float32 [C, length] or None) -> float32 [C, M].
        importance: floating point [K], >= 0, of each column; None gives all columns the same importance.

    Returns:
        float32 [N, ceil(K / group_size), M].
    """
    weight = weight.detach()
    rows, in_features = weight.shape
    step = max(1, _CHUNK_WEIGHTS // in_features) if weight.device.type == "cpu" else rows
    chunks = []
    for start in range(0, rows, step):
        parts = []
        for columns, _, length in whole_and_tail(in_features, group_size):
            values = weight[start : start + step, columns].to(torch.float32)
            share = None
            if importance is not None:
                share = importance[columns].to(torch.float32).expand(values.shape).reshape(-1, length)
            chosen = choose(values.reshape(-1, length), share)
            parts.append(chosen.view(values.shape[0], -1, chosen.shape[-1]))
        chunks.append(torch.cat(parts, 1))
    return torch.cat(chunks)
