"""The range of each group of weights over which evenly spaced levels fit it best."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .kmeans_levels import check_groups

__all__ = ["CLIP_RATIOS", "clip_search", "clip_search_reference"]

CLIP_RATIOS = tuple((99 - 3 * step) / 100 for step in range(24))
"""Shares of a group's smallest and largest weight to try, widest first. The first is 0.99, because 1 as the sigmoid of
a parameter would be at infinity."""


def clip_search(groups: Tensor, count: int, importance: Tensor | None = None) -> Tensor:
    """Shares of the minimum and the maximum of each group between which evenly spaced levels fit it best.

    Every ratio of :data:`CLIP_RATIOS` is tried for both ends together, then for the low end, then for the high end.
    This search is ours. First each group is multiplied by the power of two that brings its largest magnitude into [0.5,
    1). No magnitude is then too small or too large, and groups that differ by a power of two get the same ratios. The
    errors are float64 sums over the weights in order. The result does not depend on the CPU or on the number of
    threads. On devices other than the CPU the reference runs. Not differentiable.

    Args:
        groups: float32 [C, length], finite, length at least 1.
        count: number of levels, 2 to 256.
        importance: float32 [C, length], finite and at least 0: the factor of each squared error. None means 1.

    Returns:
        float32 [C, 2]: the ratio of the low end and that of the high end; the widest ratios of the least error.

    Raises:
        ValueError: another dtype, shape or count, NaN or Inf, or a negative importance.
    """
    return torch.ops.rcp_kernels.clip_search.default(groups, count, importance)


@torch.library.register_fake("rcp_kernels::clip_search")
def _fake(groups: Tensor, *rest: Any) -> Tensor:
    return groups.new_empty((groups.shape[0], 2))


def clip_search_reference(groups: Tensor, count: int, importance: Tensor | None = None) -> Tensor:
    """:func:`clip_search` in plain torch, on any device: on the CPU, both results are equal bit for bit.

    Raises:
        ValueError: as the operator does.
    """
    check_groups("clip_search", groups, count, importance)
    wide = groups.detach().to(torch.float64)
    exponent = torch.frexp(wide.abs().amax(1, keepdim=True)).exponent
    # In float64, which holds every power of two and every product here.
    groups = torch.ldexp(wide, -exponent).to(torch.float32)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    scratch = torch.empty_like(groups)

    def error(ratio_low: Tensor | float, ratio_high: Tensor | float) -> Tensor:
        first = low * ratio_low
        step = (high * ratio_high - first).clamp_(min=0.0) / (count - 1)
        torch.sub(groups, first, out=scratch)
        scratch.mul_(torch.where(step > 0, 1.0 / step, 0.0)).round_().clamp_(0.0, count - 1.0)
        miss = scratch.mul_(step).add_(first).sub_(groups).to(torch.float64)
        square = miss.square_() if importance is None else miss.square_() * importance
        return square.cumsum_(1)[:, -1:]

    best_low = torch.full_like(low, CLIP_RATIOS[0])
    best_high = best_low.clone()
    best = error(best_low, best_high)
    for moves_low, moves_high in ((True, True), (True, False), (False, True)):
        fixed_low, fixed_high = best_low.clone(), best_high.clone()
        for ratio in CLIP_RATIOS:
            found = error(ratio if moves_low else fixed_low, ratio if moves_high else fixed_high)
            better = found < best
            torch.where(better, found, best, out=best)
            if moves_low:
                best_low.masked_fill_(better, ratio)
            if moves_high:
                best_high.masked_fill_(better, ratio)
    return torch.cat([best_low, best_high], 1)


torch.library.impl("rcp_kernels::clip_search", "default", clip_search_reference)
