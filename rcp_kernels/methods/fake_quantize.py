"""Fake quantization of a weight to a table of levels per group: the packed format's values, differentiable.

The values are exactly those that the format stores (int8 levels, a float16 scale per group, docs/format.md). A model is
therefore trained on its final weights. The gradient to the weight is straight-through. The gradient to the levels is
the true one for weights that keep their level, so autograd trains any parameters that the levels are computed from.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..formats import LEVEL_MAX
from ..formats.levels import tensor_scale_exponent
from ..ops.quantize_weight import whole_and_tail

__all__ = ["fake_quantize", "group_range", "snap"]

# On the CPU the temporaries of such a chunk fit a core's L2 cache, and torch runs operators below 32768 elements on one
# thread. With two threads, on cores that other processes used too, each of the 20 short operators of a chunk waited up
# to 7.6 ms for the other thread (65 thousand elements: 0.003 ms of work).
_CHUNK_WEIGHTS = 32767


def group_range(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest weight of each group, without gradient: float32 [N, ceil(K / group_size)] each."""
    weight = weight.detach()
    rows, in_features = weight.shape
    shape = (rows, -(-in_features // group_size))
    low = torch.empty(shape, dtype=torch.float32, device=weight.device)
    high = torch.empty_like(low)
    for chunk, columns, groups, length in _chunks(weight, group_size):
        values = weight[chunk, columns].unflatten(1, (-1, length))
        low[chunk, groups] = values.amin(-1).to(torch.float32)
        high[chunk, groups] = values.amax(-1).to(torch.float32)
    return low, high


def fake_quantize(
    weight: Tensor,
    levels: Tensor,
    group_size: int,
    *,
    dtype: torch.dtype | None = None,
    through_rounding: bool = False,
    table: Tensor | None = None,
) -> Tensor:
    """Each weight's nearest level, as stored: ``quantize_weight(weight, bits, group_size, levels).dequantize()``.

    Gradients, straight-through over the snap to int8 and float16::

        weight     grad                   where first level < weight < last level, else 0
        levels[c]  sum of grad            over the group's weights of code c

    With ``through_rounding``, rounding is straight-through too, as in LSQ (Esser et al. 2020), for evenly spaced
    levels. A weight inside the range has the position u = (w - first) / (last - first). It subtracts ``grad * (1 - u)``
    from the first level's gradient and ``grad * u`` from the last level's gradient.

    A weight midway between two levels takes the lower one. If all levels of a group are equal, no weight is inside.

    Args:
        weight: float32, float16, bfloat16 or float64 [N, K], of magnitudes below 1e+38; any strides.
        levels: float32 [N, ceil(K / group_size), 2**bits], ascending, in units of the weight. Not checked: NaN spreads
            to the whole group.
        group_size: weights along K that share a table.
        dtype: of the result; the weight's by default. The float32 values are rounded to it once.
        through_rounding: see above.
        table: float32, of the levels' shape: the stored values of the levels, by default those of :func:`snap`. Each
            is an integer below 2**8, times its group's float16 scale, times one power of two.

    Returns:
        [N, K].
    """
    dtype = weight.dtype if dtype is None else dtype
    table = snap(levels.detach()) if table is None else table.detach()
    return _FakeQuantize.apply(weight, levels, table, group_size, dtype, through_rounding)


def snap(levels: Tensor) -> Tensor:
    """The values that ``formats.snap_levels`` would store for these levels: float32, of the same shape.

    The arithmetic is the same. The checks are left out: they read back from the device and take longer than the snap.
    """
    largest = levels.abs().amax(dim=-1)
    scales = largest / LEVEL_MAX
    exponent = tensor_scale_exponent(scales)
    ratio = torch.where(largest > 0, LEVEL_MAX / largest.to(torch.float64), 0.0)
    snapped = (levels * ratio[..., None]).round_()
    stored = (scales.to(torch.float64) * 2.0**-exponent).to(torch.float16).to(torch.float32)
    return snapped.to(torch.float32).mul_(stored[..., None]).mul_(2.0**exponent)


def _chunks(weight: Tensor, group_size: int) -> Iterator[tuple[slice, slice, slice, int]]:
    """Rows, columns, groups and group length of each chunk of a weight. Rows are divided on the CPU only."""
    rows, in_features = weight.shape
    step = max(1, _CHUNK_WEIGHTS // in_features) if weight.device.type == "cpu" else max(1, rows)
    for start in range(0, rows, step):
        for columns, groups, length in whole_and_tail(in_features, group_size):
            yield slice(start, min(start + step, rows)), columns, groups, length


class _Buffers:
    """Temporaries that all chunks share. New ones for every chunk would cost page faults each time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flat: dict[str, Tensor] = {}

    def get(self, name: str, shape: torch.Size) -> Tensor:
        count = shape.numel()
        flat = self._flat.get(name)
        if flat is None or flat.numel() < count:
            flat = self._flat[name] = torch.empty(count, dtype=torch.float32, device=self._device)
        return flat[:count].view(shape)

    def float32(self, name: str, values: Tensor) -> Tensor:
        """The values, converted to float32 if they have another dtype."""
        return values if values.dtype == torch.float32 else self.get(name, values.shape).copy_(values)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        levels: Tensor,
        table: Tensor,
        group_size: int,
        dtype: torch.dtype,
        through_rounding: bool,
    ) -> Tensor:
        bounds = table[..., 1:] * 0.5 + table[..., :-1] * 0.5
        first = table[..., :1]
        # Sums of steps are exact: all values are multiples below 2**8 of one float16 scale times a power of two.
        steps = table.diff(dim=-1)
        result = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        buffers = _Buffers(weight.device)
        for chunk, columns, groups, length in _chunks(weight, group_size):
            values = buffers.float32("values", weight[chunk, columns].unflatten(1, (-1, length)))
            out = result[chunk, columns].unflatten(1, (-1, length))
            total = out if dtype == torch.float32 else buffers.get("total", values.shape)
            above = buffers.get("above", values.shape)
            part_bounds, part_steps = bounds[chunk, groups], steps[chunk, groups]
            # Comparisons write float32. A bool result costs four times as much, and its product with floats again.
            torch.gt(values, part_bounds[..., :1], out=above)
            torch.mul(above, part_steps[..., :1], out=total)
            total.add_(first[chunk, groups])
            for k in range(1, bounds.shape[-1]):
                torch.gt(values, part_bounds[..., k : k + 1], out=above)
                total.add_(above.mul_(part_steps[..., k : k + 1]))
            if total is not out:
                out.copy_(total)
        ctx.save_for_backward(weight, levels, bounds)
        ctx.group_size = group_size
        ctx.through_rounding = through_rounding
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, levels, bounds = ctx.saved_tensors
        want_weight, want_levels = ctx.needs_input_grad[:2]
        count = levels.shape[-1]
        ends = levels[..., :1], levels[..., -1:]
        grad_weight = torch.empty_like(weight) if want_weight else None
        # sums[k] is the sum of the gradients over the weights above bound k - 1, sums[0] over all weights.
        sums = torch.empty((count, *levels.shape[:-1]), dtype=torch.float32, device=weight.device)
        inside_sums = torch.empty((2, *levels.shape[:-1]), dtype=torch.float32, device=weight.device)
        buffers = _Buffers(weight.device)
        for chunk, columns, groups, length in _chunks(weight, ctx.group_size):
            values = buffers.float32("values", weight[chunk, columns].unflatten(1, (-1, length)))
            part = buffers.float32("grad", grad[chunk, columns].unflatten(1, (-1, length)))
            mask = buffers.get("mask", values.shape)
            if want_levels:
                torch.sum(part, -1, out=sums[0, chunk, groups])
                part_bounds = bounds[chunk, groups]
                for k in range(1, count):
                    torch.gt(values, part_bounds[..., k - 1 : k], out=mask)
                    torch.sum(mask.mul_(part), -1, out=sums[k, chunk, groups])
            if want_weight or ctx.through_rounding:
                low, high = (end[chunk, groups] for end in ends)
                below = buffers.get("below", values.shape)
                torch.gt(values, low, out=mask)
                torch.lt(values, high, out=below)
                mask.mul_(below).mul_(part)
                if grad_weight is not None:
                    grad_weight[chunk, columns].unflatten(1, (-1, length)).copy_(mask)
                if ctx.through_rounding:
                    torch.sum(mask, -1, out=inside_sums[0, chunk, groups])
                    torch.sub(values, low, out=below)
                    torch.sum(mask.mul_(below), -1, out=inside_sums[1, chunk, groups])
        if not want_levels:
            return grad_weight, None, None, None, None, None
        grad_levels = torch.empty_like(levels)
        for k in range(count - 1):
            torch.sub(sums[k], sums[k + 1], out=grad_levels[..., k])
        grad_levels[..., -1] = sums[-1]
        if ctx.through_rounding:
            span = levels[..., -1] - levels[..., 0]
            at_last = torch.where(span > 0, inside_sums[1] / span, 0.0)
            grad_levels[..., -1] -= at_last
            grad_levels[..., 0] -= inside_sums[0] - at_last
        return grad_weight, grad_levels, None, None, None, None
