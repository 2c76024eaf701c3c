"""GPTQ of one weight (Frantar et al. 2023, arXiv 2210.17323): rounding with error feedback, to any levels per group.

docs/gptq.md has the formulas and what is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..formats import LEVEL_MAX, PackedWeight, check_bits, check_group_size, num_groups
from ..quantize import quantize_weight, uniform_levels
from .level_search import clip_search, for_each_group, kmeans_levels

__all__ = [
    "Chooser",
    "Factor",
    "check_arguments",
    "factor_hessian",
    "gptq_quantize_weight",
    "quantize_rows",
    "relative_error",
    "round_to_nearest",
]

Chooser = Callable[[Tensor, Tensor | None], Tensor]
"""(groups float32 [C, length], importance float32 [C, length] or None) -> ascending levels float32 [C, 2**bits]."""

# Damping is raised tenfold until the Hessian is positive definite, but not beyond its mean diagonal.
_MAX_DAMPING = 1.0
_FIRST_DAMPING = 1e-3
# Columns whose feedback to each other is applied one by one; to the rest of the block it is one matrix product.
_INNER = 32
# Weights of a group's columns at a time on the CPU, but at least so many rows: below 32768 elements torch runs an
# operator on one thread, and the many short ones here would spend their time waiting for a second (fake_quantize.py).
_CHUNK_WEIGHTS = 32767
_CHUNK_ROWS = 128
# Where the largest scale of the weight as given is put: 2**12 below float16's largest, as feedback can only enlarge it.
_SCALE_EXPONENT = 3


def gptq_quantize_weight(
    weight: Tensor,
    hessian: Tensor,
    *,
    bits: int = 2,
    group_size: int = 128,
    levels: str | Tensor | Chooser = "uniform",
    damping: float = 0.01,
    block: int = 128,
) -> PackedWeight:
    """Quantize one weight so that its output, not itself, changes least: column by column, with error feedback.

    Args:
        weight: floating point [N, K], finite.
        hessian: floating point [K, K]: X^T X of the layer's inputs [tokens, K], in any scale.
        bits: 2, 3 or 4.
        group_size: 32, 64, 128 or K.
        levels: of each group: ``"uniform"``: evenly spaced from its minimum to its maximum; ``"clip"``: evenly spaced
            over the range of least weighted squared error; ``"kmeans"``: weighted k-means; a tensor of fixed levels
            [N, groups, 2**bits]; or a function (`Chooser`). All but the fixed ones are chosen from the weights as they
            are when the group is reached, with the feedback from the groups before it.
        damping: share of the mean of the Hessian's diagonal that is added to it; raised tenfold, up to 1, as long as
            the Hessian is not positive definite.
        block: columns after which the feedback reaches the rest of the weight.

    Returns:
        The packed weight, on the device of ``weight``.

    Raises:
        ValueError: shapes, bits, group_size, levels, damping or block out of their sets, NaN or Inf, or a Hessian that
            no damping makes positive definite.
    """
    check_arguments(weight, bits, group_size, levels, damping, block, "gptq_quantize_weight")
    factor = factor_hessian(hessian, damping, "gptq_quantize_weight")
    return quantize_rows([weight], factor, bits, group_size, levels, block)[0]


def relative_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """``tr(E H E^T) / tr(W H W^T)`` with E = W - Q: the output's relative squared error on the calibration tokens."""
    weight = weight.detach().to(hessian)
    difference = weight - quantized.to(hessian)
    square = float(((weight @ hessian) * weight).sum())
    return float(((difference @ hessian) * difference).sum()) / square if square > 0 else 0.0


def check_arguments(
    weight: Tensor, bits: int, group_size: int, levels: object, damping: float, block: int, where: str
) -> None:
    """Raise ValueError, naming ``where``, unless these are arguments that :func:`gptq_quantize_weight` takes."""
    if weight.dim() != 2 or weight.numel() == 0 or not weight.is_floating_point():
        raise ValueError(
            f"{where}: weight must be floating point [out_features, in_features], both at least 1, got {weight.dtype} "
            f"of shape {tuple(weight.shape)}; flatten leading dimensions or skip the empty layer"
        )
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(f"{where}: weight must be finite, got NaN or Inf; check the checkpoint for overflow")
    try:
        check_bits(bits)
        check_group_size(group_size, weight.shape[1])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if not (isinstance(levels, Tensor) or callable(levels) or levels in _CHOOSERS):
        raise ValueError(
            f"{where}: levels must be one of {tuple(_CHOOSERS)}, or a function, got {levels!r}; check the spelling"
        )
    if not 0.0 <= damping <= _MAX_DAMPING:
        raise ValueError(f"{where}: damping must be in [0, {_MAX_DAMPING}], got {damping}; the usual one is 0.01")
    if isinstance(block, bool) or not isinstance(block, int) or block < 1:
        raise ValueError(f"{where}: block must be at least 1 column, got {block!r}; the usual one is 128")


@dataclass
class Factor:
    """Upper triangular U with (H + damping)^-1 = U^T U, float32 [K, K]; rounding column j costs 1 / U_jj^2 (K)."""

    upper: Tensor
    importance: Tensor = field(init=False)
    damping: float

    def __post_init__(self) -> None:
        self.importance = self.upper.diagonal().square().reciprocal()


def factor_hessian(hessian: Tensor, damping: float, where: str) -> Factor:
    """The factor of a Hessian [K, K], damped, of which the mean diagonal is divided out; errors as GPTQ's."""
    features = hessian.shape[-1]
    if hessian.dim() != 2 or hessian.shape[0] != features:
        raise ValueError(f"{where}: hessian must be [K, K], got shape {tuple(hessian.shape)}; pass X^T X")
    damped = hessian.detach().to(torch.float64).clone()
    if not bool(torch.isfinite(damped).all()):
        raise ValueError(
            f"{where}: the Hessian of its inputs must be finite, got NaN or Inf; look for overflow in the layers "
            f"before it, or calibrate in float32"
        )
    lowest = float(damped.diagonal().min())
    if lowest < 0.0:
        raise ValueError(
            f"{where}: the diagonal of the Hessian must be at least 0, got {lowest}; it is no X^T X: pass one"
        )
    mean = float(damped.diagonal().mean())
    if mean == 0.0:  # no input at all: plain rounding
        return Factor(torch.eye(features, dtype=torch.float32, device=hessian.device), damping)
    damped.div_(mean)
    added = 0.0
    while True:
        damped.diagonal().add_(damping - added)
        added = damping
        lower, info = torch.linalg.cholesky_ex(damped)
        if not int(info):
            upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(info):
                return Factor(upper.to(torch.float32), damping)
        if damping >= _MAX_DAMPING:
            raise ValueError(
                f"{where}: the Hessian must be positive definite once {_MAX_DAMPING} of its mean diagonal is added, "
                f"got one that is not; it is no X^T X, or the activations overflowed"
            )
        damping = min(max(10 * damping, _FIRST_DAMPING), _MAX_DAMPING)


def _uniform(groups: Tensor, importance: Tensor | None, bits: int) -> Tensor:
    return uniform_levels(groups, 2**bits)


def _clip(groups: Tensor, importance: Tensor | None, bits: int) -> Tensor:
    ratios = clip_search(groups, 2**bits, importance)
    ends = torch.stack([groups.amin(1) * ratios[:, 0], groups.amax(1) * ratios[:, 1]], 1)
    ends[:, 1] = torch.maximum(ends[:, 0], ends[:, 1])
    return uniform_levels(ends, 2**bits)


def _kmeans(groups: Tensor, importance: Tensor | None, bits: int) -> Tensor:
    return kmeans_levels(groups, 2**bits, importance)


_CHOOSERS: dict[str, Callable[[Tensor, Tensor | None, int], Tensor]] = {
    "uniform": _uniform,
    "clip": _clip,
    "kmeans": _kmeans,
}


def _chooser(levels: str | Chooser, bits: int) -> Chooser:
    if not isinstance(levels, str):
        return levels
    choose = _CHOOSERS[levels]
    return lambda groups, importance: choose(groups, importance, bits)


def round_to_nearest(weight: Tensor, bits: int, group_size: int, levels: str | Chooser) -> Tensor:
    """The baseline: the same kind of levels, chosen from the weight as it is, each weight to the nearest; float32."""
    chosen = for_each_group(weight, group_size, _chooser(levels, bits))
    return quantize_weight(weight, bits, group_size, chosen).dequantize()


def quantize_rows(
    weights: Sequence[Tensor],
    factor: Factor,
    bits: int,
    group_size: int,
    levels: str | Tensor | Chooser,
    block: int,
) -> list[PackedWeight]:
    """Quantize weights that share a Hessian, stacked: the rows of a weight never see each other."""
    stacked = torch.cat([weight.detach().to(torch.float32) for weight in weights])
    rows, in_features = stacked.shape
    if factor.upper.shape[0] != in_features:
        raise ValueError(
            f"the Hessian must be [{in_features}, {in_features}] for a weight of {in_features} columns, got "
            f"{tuple(factor.upper.shape)}; pass the one of this layer's inputs"
        )
    groups = num_groups(in_features, group_size)
    if isinstance(levels, Tensor) and tuple(levels.shape) != (rows, groups, 2**bits):
        raise ValueError(
            f"levels must be [out_features, groups, 2**bits] = {(rows, groups, 2**bits)}, got "
            f"{tuple(levels.shape)}; expand a shared table to every group"
        )
    tensor_scales = torch.cat([torch.full((w.shape[0],), _tensor_scale(w, levels)) for w in weights]).to(stacked.device)
    codes = torch.empty((rows, in_features), dtype=torch.uint8, device=stacked.device)
    tables = torch.empty((rows, groups, 2**bits), dtype=torch.int8, device=stacked.device)
    scales = torch.empty((rows, groups), dtype=torch.float16, device=stacked.device)
    step = rows
    if stacked.device.type == "cpu":
        step = max(_CHUNK_ROWS, _CHUNK_WEIGHTS // max(min(group_size, in_features), _INNER))
    for start in range(0, rows, step):
        chunk = slice(start, start + step)
        if isinstance(levels, Tensor):
            chosen: Tensor | Chooser = levels[chunk].to(stacked)
        else:
            chosen = _chooser(levels, bits)
        codes[chunk], tables[chunk], scales[chunk] = _Solver(factor, bits, group_size, chosen, block).solve(
            stacked[chunk], tensor_scales[chunk]
        )
    packed = []
    start = 0
    for weight in weights:
        part = slice(start, start + weight.shape[0])
        start = part.stop
        kept, tensor_scale = _normalize(scales[part], float(tensor_scales[part.start]))
        packed.append(
            PackedWeight.pack(codes[part], tables[part], kept, tensor_scale, bits=bits, group_size=group_size)
        )
    return packed


def _tensor_scale(weight: Tensor, levels: object) -> float:
    largest = float(weight.detach().abs().max() if not isinstance(levels, Tensor) else levels.abs().max())
    if largest == 0.0:
        return 1.0
    exponent = math.frexp(largest / LEVEL_MAX)[1] - 1 - _SCALE_EXPONENT
    return 2.0 ** min(max(exponent, -126), 127)


def _normalize(scales: Tensor, tensor_scale: float) -> tuple[Tensor, float]:
    """The same products of scale and tensor scale with the largest scale in [128, 256), where no scale is changed."""
    peak = float(scales.max())
    if peak == 0.0:
        return scales, tensor_scale
    shift = 2.0 ** (math.frexp(peak)[1] - 8)
    moved = (scales.to(torch.float32) / shift).to(torch.float16)
    exact = torch.equal(moved.to(torch.float32) * shift, scales.to(torch.float32))
    return (moved, tensor_scale * shift) if exact and tensor_scale * shift >= 2.0**-126 else (scales, tensor_scale)


class _Solver:
    """Error feedback over some rows of a weight, transposed: a column of the weight is contiguous."""

    def __init__(self, factor: Factor, bits: int, group_size: int, levels: Tensor | Chooser, block: int) -> None:
        self._factor = factor
        self._bits = bits
        self._group_size = group_size
        self._levels = levels
        self._block = block

    def solve(self, weight: Tensor, tensor_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[N, K], [N] -> codes uint8 [N, K], levels int8 [N, groups, 2**bits], scales float16 [N, groups]."""
        columns = weight.T.contiguous()
        in_features, rows = columns.shape
        upper = self._factor.upper
        codes = torch.empty((in_features, rows), dtype=torch.uint8, device=weight.device)
        tables, scales = [], []
        # A group's table needs its columns with all feedback from before it, so blocks end where groups do.
        group = self._group_size
        block = max(self._block // group * group, group)
        for start in range(0, in_features, block):
            stop = min(start + block, in_features)
            current = columns[start:stop]
            errors = torch.empty_like(current)
            for first in range(0, stop - start, group):
                last = min(first + group, stop - start)
                levels = self._choose(current[first:last], start + first)
                table, scale = _snap(levels, tensor_scale)
                tables.append(table)
                scales.append(scale)
                values = (
                    table.to(torch.float32) * scale.to(torch.float32)[:, None] * tensor_scale[:, None]
                ).T.contiguous()
                self._round(current, errors, upper[start:stop, start:stop], first, last, values)
                bounds = values[1:] * 0.5 + values[:-1] * 0.5
                group_codes = codes[start + first : start + last].zero_()
                for bound in bounds:
                    group_codes += current[first:last] > bound
            if stop < in_features:
                columns[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1.0)
        return codes.T.contiguous(), torch.stack(tables, 1), torch.stack(scales, 1)

    def _choose(self, columns: Tensor, start: int) -> Tensor:
        if isinstance(self._levels, Tensor):
            return self._levels[:, start // self._group_size]
        groups = columns.T.contiguous()
        importance = self._factor.importance[start : start + groups.shape[1]]
        return self._levels(groups, importance.expand(groups.shape))

    @staticmethod
    def _round(current: Tensor, errors: Tensor, upper: Tensor, first: int, last: int, values: Tensor) -> None:
        """Round columns first to last of a block, feeding errors back to all columns of the block after each.

        A column keeps the value that was rounded; ``errors`` are (value - stored value) / U_jj.
        """
        bounds = values[1:] * 0.5 + values[:-1] * 0.5
        steps = values.diff(dim=0)
        lowest = values[0]
        above = torch.empty_like(bounds)
        inverse = upper.diagonal().reciprocal().tolist()
        for inner in range(first, last, _INNER):
            end = min(inner + _INNER, last)
            for j in range(inner, end):
                column, error = current[j], errors[j]
                torch.gt(column, bounds, out=above)
                # The sum of steps is exact, as in fake_quantize: error feedback sees the very value that is stored.
                torch.sum(above.mul_(steps), 0, out=error)
                error.add_(lowest).sub_(column).mul_(-inverse[j])
                if j + 1 < end:
                    current[j + 1 : end].addr_(upper[j, j + 1 : end], error, alpha=-1.0)
            if end < current.shape[0]:
                current[end:].addmm_(upper[inner:end, end:].T, errors[inner:end], alpha=-1.0)


def _snap(levels: Tensor, tensor_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Levels [N, L] -> int8 [N, L] and float16 [N], as formats.snap_levels but with a tensor scale that is given."""
    levels = levels.to(torch.float64)
    largest = levels.abs().amax(1)
    ratio = torch.where(largest > 0, LEVEL_MAX / largest, 0.0)
    scales = (largest / LEVEL_MAX / tensor_scale).to(torch.float16)
    if not bool(torch.isfinite(scales).all()):
        raise ValueError(
            "levels must be finite and at most 4096 times the largest weight, got more: error feedback diverged; "
            "raise damping"
        )
    return torch.round(levels * ratio[:, None]).to(torch.int8), scales
