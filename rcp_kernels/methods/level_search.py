"""A choice of levels applied to all groups of a weight, with an importance of each column."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..ops.quantize_weight import whole_and_tail

__all__ = ["for_each_group"]

# On the CPU, bounds the copies of the weights and of their importance.
_CHUNK_WEIGHTS = 1 << 20


def for_each_group(
    weight: Tensor,
    group_size: int,
    choose: Callable[[Tensor, Tensor | None], Tensor],
    importance: Tensor | None = None,
) -> Tensor:
    """Apply ``choose`` to all groups of a weight, some rows at a time.

    Args:
        weight: floating point [N, K].
        group_size: weights along K that make a group; the last group of a row may be shorter.
        choose: (groups float32 [C, length], importance float32 [C, length] or None) -> float32 [C, M].
        importance: floating point [K], >= 0, of each column; None where all count alike.

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
