"""The levels of a packed weight: int8, ascending, with a float16 scale for each group (docs/format.md)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "LARGEST_SCALE_EXPONENT",
    "LEVEL_MAX",
    "check_ascending",
    "snap_levels",
    "tensor_scale_exponent",
    "uniform_grid",
    "uniform_range",
    "uniform_step",
]

LEVEL_MAX = 127
"""Largest level written. -128 may be read, but :func:`snap_levels` never makes it."""

LARGEST_SCALE_EXPONENT = 7
"""Where possible, the largest group scale lies in [2**7, 2**8).

Then scale * level fits float16 (127 * 256 < 65504), for consumers that dequantize in half. Scales down to 2**-21 of the
largest one keep float16's full precision.
"""


def uniform_step(bits: int) -> int:
    """The difference of neighbouring levels in a uniform group: 32, 16 or 8. Then 2**bits levels fit int8."""
    return 1 << (7 - bits)


def snap_levels(levels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Snap real-valued levels to the format's int8 levels, float16 group scales and power-of-two tensor scale.

    In each group ``level = rint(127 * v / max|v|)`` and ``scale = max|v| / 127``. The error of a level is at most 1/254
    of the group's largest level, plus the rounding of the scale to float16 (2**-11 relative).

    Args:
        levels: floating point [N, groups, 2**bits], ascending along the last dimension, in units of the weight.

    Returns:
        int8 levels [N, groups, 2**bits], float16 scales [N, groups], float32 tensor scale (0-dim, a power of two).

    Raises:
        TypeError: levels are not floating point.
        ValueError: NaN, Inf or values beyond float32 in levels, levels that descend, or levels on the meta device.
    """
    if not levels.is_floating_point():
        raise TypeError(
            f"levels must be floating point [N, groups, 2**bits], got {levels.dtype}; convert with .float()"
        )
    if levels.is_meta:
        raise ValueError("levels must have values, got a tensor on the meta device; load the levels first")
    values = levels.to(torch.float32)
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        index = (~finite).nonzero()[0].tolist()
        raise ValueError(
            f"levels must be finite in float32, got {float(values[tuple(index)])} at row, group, level {index}; check "
            f"the weight or the method that chose them"
        )
    check_ascending(values)
    largest = values.abs().amax(dim=-1)
    scales = largest / LEVEL_MAX
    exponent = tensor_scale_exponent(scales)
    tensor_scale = torch.tensor(2.0**exponent, dtype=torch.float32, device=levels.device)
    # In float64: 127 / max|v| overflows float32 where max|v| is subnormal.
    ratio = torch.where(largest > 0, LEVEL_MAX / largest.to(torch.float64), 0.0)
    snapped = torch.round(values.to(torch.float64) * ratio[..., None]).to(torch.int8)
    return snapped, (scales.to(torch.float64) / tensor_scale).to(torch.float16), tensor_scale


def tensor_scale_exponent(scales: Tensor) -> int:
    """The exponent of the tensor scale for float32 group scales; 0 if there are none, or NaN or Inf among them."""
    peak = float(scales.max()) if scales.numel() else 0.0
    if not 0.0 < peak < math.inf:
        return 0
    # Within float32's normal numbers a product with the tensor scale is exact.
    return min(max(math.frexp(peak)[1] - 1 - LARGEST_SCALE_EXPONENT, -126), 127)


def uniform_range(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Extend the ranges of uniform groups until 2**bits evenly spaced levels fit int8.

    Zero then lies between one step below the first level and the last level. A group of equal weights gets a range from
    zero to them: no scale puts all levels on one value except zero.

    Args:
        low, high: floating point, of one shape.
        bits: 2, 3 or 4.

    Returns:
        The new ``low`` and ``high``.
    """
    last, step = 2**bits - 1, uniform_step(bits)
    flat = high <= low
    below = (LEVEL_MAX - last * step) / step
    low = torch.minimum(low, torch.where(flat, 0.0, high * (below / (below + last))))
    above = LEVEL_MAX / step
    return low, torch.maximum(high, torch.where(flat, 0.0, low * (1.0 - last / above)))


def uniform_grid(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Evenly spaced int8 levels of groups with these ranges, and the group scales before they are rounded to float16.

    Args:
        low, high: floating point [...], the smallest and the largest weight of each group.
        bits: 2, 3 or 4.

    Returns:
        levels int8 [..., 2**bits], ``first + i * uniform_step(bits)`` with one integer ``first`` per group; and scales
        float64 [...], so that ``levels * scales`` spans the range.
    """
    last, step = 2**bits - 1, uniform_step(bits)
    low, high = uniform_range(low.to(torch.float64), high.to(torch.float64), bits)
    scales = (high - low) / (last * step)
    first = torch.where(scales > 0, low / scales, 0.0).round().clamp(-LEVEL_MAX, LEVEL_MAX - last * step)
    return (first[..., None] + torch.arange(2**bits, device=low.device) * step).to(torch.int8), scales


def check_ascending(levels: Tensor) -> None:
    """Raise ValueError unless ``levels`` are non-decreasing along their last dimension."""
    descending = (levels[..., 1:] < levels[..., :-1]).any(dim=-1)
    if bool(descending.any()):
        first = descending.nonzero()[0].tolist()
        raise ValueError(
            f"levels must be ascending (equal neighbours are allowed) in every group, got "
            f"{levels[tuple(first)].tolist()} in row, group {first}; sort the levels and renumber the codes to match"
        )
