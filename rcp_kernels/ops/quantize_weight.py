"""Round-to-nearest quantization of a weight into the packed format, with uniform, k-means or given levels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..formats import PackedWeight, check_bits, check_group_size, num_groups, snap_levels
from ..formats.codes import row_chunks
from ..formats.levels import tensor_scale_exponent, uniform_grid
from .clip_search import clip_search
from .kmeans_levels import kmeans_levels
from .nearest_codes import CHUNK_WEIGHTS, nearest_codes

__all__ = ["LEVELS", "UNIFORM_LEVELS", "for_each_group", "quantize_weight", "whole_and_tail"]


def quantize_weight(
    weight: Tensor, bits: int = 2, group_size: int = 128, levels: str | Tensor = "kmeans"
) -> PackedWeight:
    """Quantize a weight: choose levels per group, snap them to the format, give each weight the nearest level.

    Args:
        weight: floating point [N, K] = [out_features, in_features], finite.
        bits: bits a code: 2, 3 or 4.
        group_size: consecutive weights of a row that share a table: 32, 64, 128 or K. It need not divide K.
        levels: ``"uniform"``: evenly spaced from the group's minimum to its maximum. ``"clip"``: evenly spaced over the
            best of 72 narrower ranges (:func:`rcp_kernels.ops.clip_search`). ``"kmeans"``: the levels of least squared
            error that Lloyd's algorithm finds for each group (Lloyd 1982). Or a floating point tensor
            [N, ceil(K/group_size), 2**bits] of ascending levels in units of the weight. Evenly spaced levels store no
            tables: the packed weight is of kind ``"uniform"``, and its zero-points are rounded to ``2**(bits - 7)``
            levels.

    Returns:
        The packed weight, on the device of ``weight``.

    Raises:
        TypeError: weight is not a floating point tensor, or levels is neither a name nor a tensor.
        ValueError: wrong shape, bits or group size; a sparse weight; a weight or levels on the meta device; NaN or Inf
            in either; unknown, descending or misshapen levels.
    """
    check_bits(bits)
    weight = _check_weight(weight)
    rows, in_features = weight.shape
    check_group_size(group_size, in_features)
    shape = (rows, num_groups(in_features, group_size), 2**bits)
    if isinstance(levels, str) and levels in UNIFORM_LEVELS:
        choose_range = UNIFORM_LEVELS[levels]
        ends = for_each_group(weight, group_size, lambda groups, _: choose_range(groups, bits))
        snapped, exact = uniform_grid(ends[..., 0], ends[..., 1], bits)
        exponent = tensor_scale_exponent(exact)
        scales = (exact * 2.0**-exponent).to(torch.float16)
        return _pack(
            weight, snapped, scales, torch.tensor(2.0**exponent, device=weight.device), group_size
        ).as_uniform()
    if isinstance(levels, Tensor):
        if tuple(levels.shape) != shape:
            raise ValueError(
                f"quantize_weight: levels must be [out_features, groups, 2**bits] = {shape}, got "
                f"{tuple(levels.shape)}; expand a shared table to every group"
            )
        # Meta levels cannot be moved; snap_levels refuses them.
        values = levels.detach() if levels.is_meta else levels.detach().to(weight.device)
    elif isinstance(levels, str):
        if levels not in LEVELS:
            raise ValueError(
                f"quantize_weight: levels must be one of {LEVELS} or a tensor of levels, got {levels!r}; "
                f"check the spelling"
            )
        values = for_each_group(weight, group_size, lambda groups, _: kmeans_levels(groups, 2**bits))
    else:
        raise TypeError(
            f"quantize_weight: levels must be one of {LEVELS} or a tensor of levels, got "
            f"{type(levels).__name__}; convert with torch.as_tensor"
        )
    return _pack(weight, *snap_levels(values), group_size)


def _pack(weight: Tensor, levels: Tensor, scales: Tensor, tensor_scale: Tensor, group_size: int) -> PackedWeight:
    """Give each weight the code of its nearest stored level."""
    rows, in_features = weight.shape
    table = levels.to(torch.float32) * scales.to(torch.float32)[..., None] * tensor_scale
    codes = nearest_codes(weight, table, group_size, packed=True)
    bits = levels.shape[-1].bit_length() - 1
    return PackedWeight(
        codes, levels.contiguous(), scales, tensor_scale, bits, group_size, in_features, rows
    ).validate()


def _check_weight(weight: Tensor) -> Tensor:
    """The weight as contiguous float32, checked."""
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
    # Contiguous, as groups are views of it.
    weight = weight.detach().to(torch.float32).contiguous()
    finite = torch.isfinite(weight)
    if not bool(finite.all()):
        index = (~finite).nonzero()[0].tolist()
        raise ValueError(
            f"quantize_weight: weight must be finite in float32, got {float(weight[tuple(index)])} at row, column "
            f"{index}; check the checkpoint for overflow"
        )
    return weight


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
    chunks = []
    for rows_now in row_chunks(rows, in_features, CHUNK_WEIGHTS):
        parts = []
        for columns, _, length in whole_and_tail(in_features, group_size):
            values = weight[rows_now, columns].to(torch.float32)
            share = None
            if importance is not None:
                share = importance[columns].to(torch.float32).expand(values.shape).reshape(-1, length)
            chosen = choose(values.reshape(-1, length), share)
            parts.append(chosen.view(values.shape[0], -1, chosen.shape[-1]))
        chunks.append(torch.cat(parts, 1))
    return torch.cat(chunks)


def full_range(groups: Tensor, bits: int, importance: Tensor | None = None) -> Tensor:
    """[C, length] -> [C, 2]: the smallest and the largest weight of each group."""
    return torch.stack(groups.aminmax(dim=1), 1)


def clip_range(groups: Tensor, bits: int, importance: Tensor | None = None) -> Tensor:
    """[C, length] -> [C, 2]: the range of least squared error, each weight's error times its importance [C, length]."""
    ends = full_range(groups, bits)
    # Equal weights need no search: every range up to them has the same error.
    ends = torch.where((ends[:, :1] == ends[:, 1:]), ends, ends * clip_search(groups, 2**bits, importance))
    # The two shares can move the ends of a group past each other.
    ends[:, 1] = torch.maximum(ends[:, 0], ends[:, 1])
    return ends


UNIFORM_LEVELS: dict[str, Callable[..., Tensor]] = {"uniform": full_range, "clip": clip_range}
"""How evenly spaced levels are chosen: (groups, bits, importance) -> ranges."""

LEVELS = (*UNIFORM_LEVELS, "kmeans")
