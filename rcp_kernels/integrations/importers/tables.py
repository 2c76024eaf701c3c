"""Levels from other libraries into :class:`PackedWeight`, exactly where int8 levels and float16 scales allow that.

An importer reads a layout into codes of one byte each, and into levels: integers with a scale for each group (a grid),
or real numbers (a table). A group is held exactly if there are integers L in [-127, 127] and a number s of at most 11
significant bits with ``level = s * L``. The smallest and the largest such s of the tensor must also be within float16's
range. This module decides both. It refuses levels that do not fit, or rounds them and measures the error.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ...formats import GROUP_SIZES, LARGEST_SCALE_EXPONENT, LEVEL_MAX, ImportedWeight, PackedWeight, num_groups

__all__ = ["pack_levels"]

# Bounds the rows of a step: a table entry takes about 60 bytes of temporaries.
_CHUNK_ENTRIES = 1 << 18
_SIGNIFICANT_BITS = 11  # of a float16


def pack_levels(
    where: str,
    codes: Tensor,
    levels: Tensor,
    scales: Tensor | None = None,
    *,
    bits: int,
    group_size: int,
    exact: bool,
    permutation: Tensor | None = None,
    bias: Tensor | None = None,
) -> ImportedWeight:
    """Pack codes and levels: ``value = levels[n, g, code]``, times ``scales[n, g]`` where there are scales.

    A group is stored exactly where that is possible. Else (exact=False) a scale is rounded to float16, and a table as
    ``formats.snap_levels`` does, with an error of at most 1/254 + 2**-11 of the group's largest level.

    Args:
        where: the caller; begins an error message.
        codes: uint8 [N, K], each below 2**bits.
        levels: [N, groups, 2**bits], in any order: integers in [-127, 127] with scales, else floating point.
        scales: floating point [N, groups] of any sign, or None.
        bits: 2, 3 or 4.
        group_size: of the source: 32, K, or a multiple of 32, which is stored as groups of 128, 64 or 32.
        exact: refuse levels and scales that the format cannot hold.
        permutation, bias: for the result.

    Raises:
        ValueError: levels or scales that are not finite or, if exact, not held; a group size that the format does not
            have.
    """
    in_features = codes.shape[1]
    stored_size = _stored_group_size(where, group_size, in_features)
    _check_finite(where, "levels", levels)
    if scales is not None:
        _check_finite(where, "scales", scales)
    if stored_size != group_size:  # a long group becomes several with the same table
        source = torch.arange(num_groups(in_features, stored_size), device=levels.device) * stored_size // group_size
        levels, scales = levels[:, source], None if scales is None else scales[:, source]
    if permutation is not None:
        codes = codes[:, permutation.to(codes.device)]
    group = torch.arange(in_features, device=codes.device) // stored_size
    packer = _Packer(levels, scales, group.to(torch.int64))
    codes = packer.sort_levels(codes)
    stored, exponent = packer.float16_scales()
    worst, place = packer.worst_error(stored, exponent)
    if exact and worst > 0.0:
        raise ValueError(
            f"{where}: every level must be an integer in [-127, 127] times a float16 scale to be held exactly, got an "
            f"error of {worst:.2g} of the group's largest level in row, group {place}; pass exact=False to round"
        )
    weight = PackedWeight.pack(
        codes,
        torch.from_numpy(packer.integers).to(codes.device),
        torch.from_numpy(stored).to(codes.device),
        math.ldexp(1.0, exponent),
        bits=bits,
        group_size=stored_size,
    )
    return ImportedWeight(weight, worst, permutation, bias)


class _Packer:
    """The levels of one weight on their way into the format, in float64, a few rows at a time.

    Attributes:
        integers: int8 [N, groups, levels], ascending.
        factors: float64 [N, groups], the scales before they are rounded.
        tables: for a table, the sorted levels of each chunk of rows; empty for a grid.
    """

    def __init__(self, levels: Tensor, scales: Tensor | None, group: Tensor) -> None:
        self.levels, self.scales = levels, scales
        self.first_entry = group * levels.shape[2]
        self.integers = np.empty(levels.shape, np.int8)
        self.factors = np.empty(levels.shape[:2], np.float64)
        self.tables: list[np.ndarray] = []
        step = max(1, _CHUNK_ENTRIES // max(1, levels.shape[1] * levels.shape[2]))
        self.chunks = [slice(start, start + step) for start in range(0, len(levels), step)]

    def sort_levels(self, codes: Tensor) -> Tensor:
        """Fill ``integers`` and ``factors``, and return the codes, uint8 [N, K], of the sorted levels."""
        sorted_codes = torch.empty_like(codes)
        for chunk in self.chunks:
            levels, scales = self._read(chunk)
            values = levels if scales is None else levels * scales[..., None]
            order = np.argsort(values, axis=-1, kind="stable")
            rank = np.empty_like(order)
            np.put_along_axis(rank, order, np.broadcast_to(np.arange(order.shape[-1]), order.shape), axis=-1)
            lookup = torch.from_numpy(rank.reshape(len(rank), -1)).to(codes.device)
            ranks = lookup.gather(1, codes[chunk].to(torch.int64) + self.first_entry)
            sorted_codes[chunk] = ranks.to(torch.uint8)
            used = torch.zeros_like(lookup).scatter_(1, ranks + self.first_entry, 1).cpu().numpy()
            used = used.astype(bool).reshape(order.shape)
            values = np.take_along_axis(values, order, axis=-1)
            if scales is None:
                values = _only_used(values, used)
                self.tables.append(values)
                self.integers[chunk], self.factors[chunk] = _integer_levels(values)
            else:
                # A group of zeros may have any scale. MXFP4's is 2**-127, which leaves no room for the other scales.
                zero = ~(used & (values != 0)).any(axis=-1)
                levels = np.take_along_axis(levels, order, axis=-1)
                self.integers[chunk] = np.where(zero[..., None], 0.0, levels)
                self.factors[chunk] = np.where(zero, 0.0, scales)
        return sorted_codes

    def _read(self, rows: slice) -> tuple[np.ndarray, np.ndarray | None]:
        """Levels and scales; a negative scale moves its sign into the levels, a scale of 0 gives levels of 0."""
        levels = self.levels[rows].to(torch.float64).cpu().numpy()
        if self.scales is None:
            return levels, None
        scales = self.scales[rows].to(torch.float64).cpu().numpy()
        levels = np.where(scales[..., None] < 0, -levels, levels)
        # With a scale of 0 all values are equal, and the stable sort would leave the levels unsorted.
        return np.where(scales[..., None] == 0, 0.0, levels), np.abs(scales)

    def float16_scales(self) -> tuple[np.ndarray, int]:
        """``factors`` as float16 [N, groups], and the exponent of the tensor scale."""
        exponent = _tensor_exponent(self.factors)
        # Clamped: a scale that is to be rounded may round to more than float16 has.
        return np.ldexp(self.factors, -exponent).clip(max=65504.0).astype(np.float16), exponent

    def worst_error(self, stored: np.ndarray, exponent: int) -> tuple[float, tuple[int, int]]:
        """The largest error of a level, relative to the largest level of its group, and its row and group."""
        worst, place = 0.0, (0, 0)
        for i, chunk in enumerate(self.chunks):
            values = self.tables[i] if self.tables else self.integers[chunk] * self.factors[chunk, :, None]
            held = np.ldexp(stored[chunk].astype(np.float64), exponent)[..., None] * self.integers[chunk]
            largest = np.abs(values).max(axis=-1)
            error = np.abs(held - values).max(axis=-1) / np.where(largest > 0, largest, 1.0)
            if error.size and float(error.max()) > worst:
                worst = float(error.max())
                row, group = np.unravel_index(int(error.argmax()), error.shape)
                place = (chunk.start + int(row), int(group))
        return worst, place


def _check_finite(where: str, name: str, tensor: Tensor) -> None:
    finite = torch.isfinite(tensor)
    if not bool(finite.all()):
        index = (~finite).nonzero()[0].tolist()
        raise ValueError(f"{where}: {name} must be finite, got {tensor[tuple(index)]} at {index}; the file is damaged")


def _stored_group_size(where: str, group_size: int, in_features: int) -> int:
    if group_size in GROUP_SIZES or group_size == in_features:
        return group_size
    for size in reversed(GROUP_SIZES):
        if group_size % size == 0:
            return size
    raise ValueError(
        f"{where}: group_size must be in_features ({in_features}) or a multiple of {GROUP_SIZES[0]}, got {group_size}; "
        f"the format has no smaller groups: requantize the dequantized weight with quantize_weight"
    )


def _only_used(values: np.ndarray, used: np.ndarray) -> np.ndarray:
    """Sorted levels; a neighbour replaces each level that no weight uses, as such a level need not be held."""
    source = np.maximum.accumulate(np.where(used, np.arange(values.shape[-1]), -1), axis=-1)
    source = np.where(source < 0, used.argmax(axis=-1)[..., None], source)
    return np.take_along_axis(values, source, axis=-1)


def _integer_levels(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Integers and a scale for sorted levels [R, groups, L]: without error where that is possible, else nearest.

    Write the levels as integers m in units of a common power of two. Let g be their greatest common divisor. The
    possible scales are g / d for the divisors d of g. The smallest d is searched that leaves 11 significant bits.
    """
    largest = np.abs(values).max(axis=-1)
    unit = np.frexp(largest)[1] - 53  # |m| < 2**53
    m = np.ldexp(values, -unit[..., None])
    # If m is no integer, the levels span more than 53 bits.
    open_ = (m == np.rint(m)).all(axis=-1) & (largest > 0)
    m = np.where(open_[..., None], m, 0.0).astype(np.int64)
    divisor = np.gcd.reduce(np.abs(m), axis=-1)
    ratio = m // np.maximum(divisor, 1)[..., None]
    span = np.abs(ratio).max(axis=-1)
    scales = largest / LEVEL_MAX
    levels = np.rint(values / np.where(largest > 0, largest, 1.0)[..., None] * LEVEL_MAX)
    for d in range(1, LEVEL_MAX + 1):
        open_ &= span * d <= LEVEL_MAX
        if not open_.any():
            break
        factor = divisor // d
        odd = factor // np.maximum(factor & -factor, 1)
        fits = open_ & (divisor % d == 0) & (odd < 2**_SIGNIFICANT_BITS)
        scales = np.where(fits, np.ldexp(factor.astype(np.float64), unit), scales)
        levels = np.where(fits[..., None], ratio * d, levels)
        open_ &= ~fits
    return levels, scales


def _tensor_exponent(scales: np.ndarray) -> int:
    """The exponent of the tensor scale that keeps all scales exact that float16 can hold.

    Where that leaves a choice, the largest scale lies in [128, 256).
    """
    positive = scales[scales > 0]
    if not positive.size:
        return 0
    mantissa, exponent = np.frexp(positive)
    whole = np.ldexp(mantissa, 53).astype(np.int64)
    lowest_bit = np.frexp((whole & -whole).astype(np.float64))[1] - 1 + exponent - 53
    short = exponent - lowest_bit <= _SIGNIFICANT_BITS
    largest = int(exponent.max()) - 1
    wanted = largest - LARGEST_SCALE_EXPONENT
    if short.any():  # float16's lowest bit is 2**-24, its largest exponent 15
        wanted = min(wanted, int(lowest_bit[short].min()) + 24)
    return min(max(wanted, largest - 15, -126), 127)
