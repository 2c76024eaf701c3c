"""Round-to-nearest quantization of a weight into the packed format: uniform, k-means or given levels per group."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .formats import PackedWeight, check_bits, check_group_size, num_groups, snap_levels

__all__ = ["KMEANS_ITERATIONS", "kmeans_levels", "quantize_weight", "uniform_levels", "whole_and_tail"]

# Small enough for a chunk and its temporaries to stay in a core's cache while it is passed over several times.
_CHUNK_WEIGHTS = 1 << 20
KMEANS_ITERATIONS = 20
"""Of Lloyd's algorithm, at most."""


def quantize_weight(
    weight: Tensor, bits: int = 2, group_size: int = 128, levels: str | Tensor = "kmeans"
) -> PackedWeight:
    """Quantize a weight: choose levels per group, snap them to the format, give each weight the nearest level.

    Args:
        weight: floating point [N, K] = [out_features, in_features], finite.
        bits: bits a code: 2, 3 or 4.
        group_size: consecutive weights of a row that share a table: 32, 64, 128 or K. K need not be a multiple.
        levels: ``"uniform"``: evenly spaced from the group's minimum to its maximum; ``"kmeans"``: the levels of least
            squared error that Lloyd's algorithm finds for each group (Lloyd 1982); or a floating point tensor
            [N, ceil(K/group_size), 2**bits] of ascending levels in units of the weight.

    Returns:
        The packed weight, on the device of ``weight``.

    Raises:
        TypeError: weight is not a floating point tensor, or levels is neither a name nor a tensor.
        ValueError: wrong shape, bits or group size; a sparse weight; a weight or levels on the meta device; NaN or Inf
            in either; unknown, descending or misshapen levels.
    """
    check_bits(bits)
    if not isinstance(weight, Tensor):
        raise TypeError(
            f"quantize_weight: weight must be a floating point tensor, got {type(weight).__name__}; convert with "
            f"torch.as_tensor"
        )
    if not weight.is_floating_point():
        raise TypeError(f"quantize_weight: weight must be floating point, got {weight.dtype}; convert with .float()")
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(
            f"quantize_weight: weight must be [out_features, in_features], both at least 1, got shape "
            f"{tuple(weight.shape)}; flatten leading dimensions or skip the empty layer"
        )
    if weight.is_meta:
        raise ValueError("quantize_weight: weight is on the meta device and has no values; load the checkpoint first")
    if weight.layout != torch.strided:
        raise ValueError(f"quantize_weight: weight must be dense, got {weight.layout}; convert with .to_dense()")
    # Contiguous, so that groups are: searchsorted wants it.
    weight = weight.detach().to(torch.float32).contiguous()
    rows, in_features = weight.shape
    check_group_size(group_size, in_features)
    finite = torch.isfinite(weight)
    if not bool(finite.all()):
        index = (~finite).nonzero()[0].tolist()
        raise ValueError(
            f"quantize_weight: weight must be finite in float32, got {float(weight[tuple(index)])} at row, column "
            f"{index}; check the checkpoint for overflow"
        )
    shape = (rows, num_groups(in_features, group_size), 2**bits)
    if isinstance(levels, Tensor):
        if tuple(levels.shape) != shape:
            raise ValueError(
                f"quantize_weight: levels must be [out_features, groups, 2**bits] = {shape}, got "
                f"{tuple(levels.shape)}; expand a shared table to every group"
            )
        # Levels without values are refused by snap_levels; they cannot be moved.
        values = levels.detach() if levels.is_meta else levels.detach().to(weight.device)
    elif isinstance(levels, str):
        if levels not in _CHOOSERS:
            raise ValueError(
                f"quantize_weight: levels must be one of {tuple(_CHOOSERS)} or a tensor of levels, got {levels!r}; "
                f"check the spelling"
            )
        values = _choose_levels(weight, group_size, shape, _CHOOSERS[levels])
    else:
        raise TypeError(
            f"quantize_weight: levels must be one of {tuple(_CHOOSERS)} or a tensor of levels, got "
            f"{type(levels).__name__}; convert with torch.as_tensor"
        )
    snapped, scales, tensor_scale = snap_levels(values)
    table = snapped.to(torch.float32) * scales.to(torch.float32)[..., None] * tensor_scale
    codes = _nearest_codes(weight, group_size, table)
    return PackedWeight.pack(codes, snapped, scales, tensor_scale, bits=bits, group_size=group_size)


def whole_and_tail(in_features: int, group_size: int) -> list[tuple[slice, slice, int]]:
    """Columns, groups and group length of the whole groups of a row, then of a shorter last one, if any."""
    whole = in_features // group_size
    tail = in_features % group_size
    parts = []
    if whole:
        parts.append((slice(0, whole * group_size), slice(0, whole), group_size))
    if tail:
        parts.append((slice(whole * group_size, in_features), slice(whole, whole + 1), tail))
    return parts


def _row_step(in_features: int) -> int:
    return max(1, _CHUNK_WEIGHTS // in_features)


def _choose_levels(
    weight: Tensor, group_size: int, shape: tuple[int, int, int], choose: Callable[[Tensor, int], Tensor]
) -> Tensor:
    rows, in_features = weight.shape
    values = torch.empty(shape, dtype=torch.float32, device=weight.device)
    step = _row_step(in_features)
    for start in range(0, rows, step):
        chunk = slice(start, start + step)
        for columns, groups, length in whole_and_tail(in_features, group_size):
            group_rows = weight[chunk, columns].reshape(-1, length)
            values[chunk, groups] = choose(group_rows, shape[2]).view(-1, values[chunk, groups].shape[1], shape[2])
    return values


def uniform_levels(groups: Tensor, count: int) -> Tensor:
    """[C, length] -> [C, count], evenly spaced from each group's minimum to its maximum."""
    # In float64, where the span of a group cannot overflow. Rounding keeps this form ascending; a weighted sum of the
    # two ends would not be for a constant group.
    low, high = (end.to(torch.float64) for end in groups.aminmax(dim=1, keepdim=True))
    position = torch.linspace(0.0, 1.0, count, dtype=torch.float64, device=groups.device)
    return (low + (high - low) * position).to(torch.float32)


def kmeans_levels(groups: Tensor, count: int) -> Tensor:
    """[C, length] -> [C, count], Lloyd's algorithm in one dimension on each group.

    A sorted group's clusters are intervals, so after one sort and one prefix sum an iteration costs a binary search for
    each of the count - 1 boundaries, not a pass over the weights.
    """
    ordered = _sort_rows(groups)
    length = ordered.shape[1]
    # float64: cluster sums are differences of prefix sums.
    prefix = torch.nn.functional.pad(ordered.to(torch.float64).cumsum_(dim=1), (1, 0))
    # Start halfway between equally populated and equally wide intervals. On 32768 normal groups of 128 the relative
    # error at 2, 3 and 4 bits is .328 .165 .078, from population alone .328 .177 .103, from width alone .330 .169 .083;
    # more iterations change the fourth digit.
    position = (torch.arange(count, dtype=torch.float64, device=groups.device) + 0.5) / count
    low, high = ordered[:, :1].to(torch.float64), ordered[:, -1:].to(torch.float64)
    centers = 0.5 * (ordered[:, (position * length).to(torch.int64)] + low + (high - low) * position)
    edges = torch.zeros((ordered.shape[0], count + 1), dtype=torch.int64, device=groups.device)
    edges[:, -1] = length
    for _ in range(KMEANS_ITERATIONS):
        bounds = (centers[:, 1:] + centers[:, :-1]).mul_(0.5).to(torch.float32)
        inner = torch.searchsorted(ordered, bounds)
        if torch.equal(inner, edges[:, 1:-1]):
            break
        edges[:, 1:-1] = inner
        population = edges.diff(dim=1)
        # An empty cluster keeps its center: its neighbours' means stay on their sides of it, so the order holds.
        centers = torch.where(population > 0, prefix.gather(1, edges).diff(dim=1) / population, centers)
    return centers.to(torch.float32)


def _sort_rows(groups: Tensor) -> Tensor:
    # numpy sorts short float32 rows with vector instructions: 128 a row, 0.03 s against torch's 0.27 s for 8 M weights.
    if groups.device.type == "cpu":
        return torch.from_numpy(np.sort(groups.numpy(), axis=1))
    return groups.sort(dim=1).values


_CHOOSERS: dict[str, Callable[[Tensor, int], Tensor]] = {"uniform": uniform_levels, "kmeans": kmeans_levels}


def _nearest_codes(weight: Tensor, group_size: int, table: Tensor) -> Tensor:
    """uint8 [N, K]: for each weight the number of midpoints between neighbouring levels that lie below it."""
    rows, in_features = weight.shape
    codes = torch.empty((rows, in_features), dtype=torch.uint8, device=weight.device)
    # Halved before the sum, which could overflow.
    midpoints = table[..., 1:] * 0.5 + table[..., :-1] * 0.5
    step = _row_step(in_features)
    for start in range(0, rows, step):
        chunk = slice(start, start + step)
        for columns, groups, length in whole_and_tail(in_features, group_size):
            values = weight[chunk, columns].reshape(-1, length)
            bounds = midpoints[chunk, groups].reshape(-1, midpoints.shape[2])
            nearest = torch.zeros(values.shape, dtype=torch.uint8, device=weight.device)
            for i in range(bounds.shape[1]):
                nearest += values > bounds[:, i : i + 1]
            codes[chunk, columns] = nearest.view(-1, codes[chunk, columns].shape[1])
    return codes
