"""Levels of groups of weights by search: clipped uniform grids and k-means, with an importance for each weight."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import quantize

__all__ = ["CLIP_RATIOS", "clip_search", "for_each_group", "kmeans_levels"]

# Shares of a group's smallest and largest weight that clip_search tries, widest first. 0.99 and not 1: as the sigmoid
# of a parameter, 1 would be at infinity.
CLIP_RATIOS = tuple(round(0.99 - 0.03 * step, 2) for step in range(24))
# Of the order of a core's cache; below 32768 torch runs an operator on one thread (fake_quantize.py says why).
_CHUNK_WEIGHTS = 32767


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
        for columns, _, length in quantize.whole_and_tail(in_features, group_size):
            values = weight[start : start + step, columns].to(torch.float32)
            share = None
            if importance is not None:
                share = importance[columns].to(torch.float32).expand(values.shape).reshape(-1, length)
            chosen = choose(values.reshape(-1, length), share)
            parts.append(chosen.view(values.shape[0], -1, chosen.shape[-1]))
        chunks.append(torch.cat(parts, 1))
    return torch.cat(chunks)


def clip_search(groups: Tensor, count: int, importance: Tensor | None = None) -> Tensor:
    """Shares of the minimum and the maximum of each group between which evenly spaced levels fit it best.

    Every ratio of ``CLIP_RATIOS`` is tried for both ends together, then for the low end, then for the high end (ours).

    Args:
        groups: float32 [C, length].
        count: number of levels.
        importance: float32 [C, length], >= 0, of each squared error; None where all count alike.

    Returns:
        float32 [C, 2]: the ratio of the low end and that of the high end; the widest ones that reach the least error.
    """
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    scratch = torch.empty_like(groups)

    def error(ratio_low: Tensor | float, ratio_high: Tensor | float) -> Tensor:
        first = low * ratio_low
        step = (high * ratio_high - first).clamp_(min=0.0) / (count - 1)
        torch.sub(groups, first, out=scratch)
        scratch.mul_(torch.where(step > 0, 1.0 / step, 0.0)).round_().clamp_(0.0, count - 1.0)
        scratch.mul_(step).add_(first).sub_(groups).square_()
        if importance is not None:
            scratch.mul_(importance)
        return scratch.sum(1, keepdim=True)

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


def kmeans_levels(groups: Tensor, count: int, importance: Tensor | None = None) -> Tensor:
    """The levels of least (weighted) squared error that Lloyd's algorithm finds in each group (Lloyd 1982).

    Args:
        groups: float32 [C, length].
        count: number of levels.
        importance: float32 [C, length], >= 0; None where all count alike, which gives ``quantize_weight``'s levels.
            A group of importance zero throughout is treated so too.

    Returns:
        float32 [C, count], ascending.
    """
    if importance is None:
        return quantize.kmeans_levels(groups, count)
    ordered, order = groups.sort(dim=1)
    mass = importance.gather(1, order).to(torch.float64)
    mass = torch.where(mass.sum(1, keepdim=True) > 0, mass, 1.0)
    pad = torch.nn.functional.pad
    mass_before = pad(mass.cumsum(1), (1, 0))
    moment_before = pad((mass * ordered).cumsum_(1), (1, 0))
    # The start of quantize.kmeans_levels, which counts weights, not their importance: levels cover the whole range.
    position = (torch.arange(count, dtype=torch.float64, device=groups.device) + 0.5) / count
    low, high = ordered[:, :1].to(torch.float64), ordered[:, -1:].to(torch.float64)
    centers = 0.5 * (ordered[:, (position * ordered.shape[1]).to(torch.int64)] + low + (high - low) * position)
    edges = torch.zeros((ordered.shape[0], count + 1), dtype=torch.int64, device=groups.device)
    edges[:, -1] = ordered.shape[1]
    for _ in range(quantize.KMEANS_ITERATIONS):
        bounds = (centers[:, 1:] + centers[:, :-1]).mul_(0.5).to(torch.float32)
        inner = torch.searchsorted(ordered, bounds)
        if torch.equal(inner, edges[:, 1:-1]):
            break
        edges[:, 1:-1] = inner
        inside = mass_before.gather(1, edges).diff(dim=1)
        means = moment_before.gather(1, edges).diff(dim=1) / inside
        # Rounding of the prefix sums could put the mean of a cluster of little mass outside of it.
        means = torch.minimum(
            torch.maximum(means, ordered.gather(1, edges[:, :-1].clamp(max=ordered.shape[1] - 1))),
            ordered.gather(1, (edges[:, 1:] - 1).clamp_(min=0)),
        )
        centers = torch.where(inside > 0, means, centers)
    return centers.to(torch.float32)
