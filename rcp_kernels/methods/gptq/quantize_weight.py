"""GPTQ of one weight (Frantar et al. 2023, arXiv 2210.17323): rounding with error feedback, to any levels per group.

docs/gptq.md has the formulas and names the choices that are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...formats import LEVEL_MAX, PackedWeight, check_bits, check_group_size, num_groups
from ...formats.levels import uniform_grid
from ...ops.checks import check_int
from ...ops.gptq_round import gptq_round
from ...ops.kmeans_levels import kmeans_levels
from ...ops.quantize_weight import LEVELS, UNIFORM_LEVELS, for_each_group, quantize_weight

__all__ = [
    "Chooser",
    "Factor",
    "add_gram",
    "check_arguments",
    "factor_hessian",
    "gptq_quantize_weight",
    "quantize_rows",
    "relative_errors",
    "round_to_nearest",
]

Chooser = Callable[[Tensor, Tensor | None], Tensor]
"""(groups float32 [C, length], importance float32 [C, length] or None) -> ascending levels float32 [C, 2**bits]."""

# If the Cholesky decomposition fails, damping is multiplied by ten, up to 1.0. Damping is a share of the mean diagonal.
_MAX_DAMPING = 1.0
_FIRST_DAMPING = 1e-3
# Columns per product of a triangle. On a large matrix the triangle saves half of the work.
_TRIANGLE_BLOCK = 256
# The largest scale of the original weight gets this exponent, 2**12 below float16's largest: feedback enlarges scales.
_SCALE_EXPONENT = 3
_DIVERGED = "error feedback diverged; raise damping"


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
    """Quantize one weight column by column, with feedback of the rounding errors, to minimize the output's error.

    Args:
        weight: floating point [N, K], finite.
        hessian: floating point [K, K]: X^T X of the layer's inputs X [tokens, K], times any factor.
        bits: 2, 3 or 4.
        group_size: 32, 64, 128 or K.
        levels: the levels of each group. ``"uniform"``: evenly spaced from minimum to maximum. ``"clip"``: evenly
            spaced over the range of least weighted squared error. ``"kmeans"``: weighted k-means. Or a function
            (`Chooser`), or a tensor of fixed levels [N, groups, 2**bits]. All but fixed levels are chosen when the
            group is reached, from weights that contain the feedback of all groups before.
        damping: this share of the mean of the Hessian's diagonal is added to the diagonal. It is raised tenfold, up to
            1, until the Hessian is positive definite.
        block: number of columns after which the feedback is added to the rest of the weight.

    Returns:
        The packed weight, on the device of ``weight``.

    Raises:
        ValueError: a shape, bits, group_size, levels, damping or block that is not allowed, NaN or Inf, or a Hessian
            that no damping makes positive definite.
    """
    check_arguments(weight, bits, group_size, levels, damping, block, "gptq_quantize_weight")
    factor = factor_hessian(hessian, damping, "gptq_quantize_weight")
    return quantize_rows([weight], factor, bits, group_size, levels, block)[0]


def add_gram(total: Tensor, x: Tensor) -> None:
    """Add x^T x to the upper triangle of a float32 matrix [K, K]; x is float32 [tokens, K]."""
    for columns in _column_blocks(x.shape[1]):
        total[: columns.stop, columns].addmm_(x[:, : columns.stop].T, x[:, columns])


def _column_blocks(features: int) -> Iterator[slice]:
    for start in range(0, features, _TRIANGLE_BLOCK):
        yield slice(start, min(start + _TRIANGLE_BLOCK, features))


def _squared_output(weight: Tensor, hessian: Tensor) -> float:
    """``tr(W H W^T)`` of a symmetric H. Reads the upper triangle of H only."""
    total = 0.0
    for columns in _column_blocks(weight.shape[1]):
        part = weight[:, columns]
        product = part @ hessian[columns, columns]
        if columns.start:
            product.addmm_(weight[:, : columns.start], hessian[: columns.start, columns], alpha=2.0)
        total += float(product.mul_(part).sum())
    return total


def relative_errors(weight: Tensor, quantized: Sequence[Tensor], hessian: Tensor) -> list[float]:
    """``tr(E H E^T) / tr(W H W^T)`` with E = W - Q, for each Q: the output's relative squared error."""
    weight = weight.detach().to(hessian)
    square = _squared_output(weight, hessian)
    return [_squared_output(weight - each.to(hessian), hessian) / square if square > 0 else 0.0 for each in quantized]


def check_arguments(
    weight: Tensor, bits: int, group_size: int, levels: object, damping: float, block: int, where: str
) -> None:
    """Raise ValueError unless :func:`gptq_quantize_weight` takes these arguments. ``where`` begins the message."""
    if weight.dim() != 2 or weight.numel() == 0 or not weight.is_floating_point():
        raise ValueError(
            f"{where}: weight must be floating point [out_features, in_features], both at least 1, got {weight.dtype} "
            f"of shape {tuple(weight.shape)}; flatten leading dimensions or skip the empty layer"
        )
    # A weight that is read later is checked as it is read.
    if not weight.is_meta and not bool(torch.isfinite(weight).all()):
        raise ValueError(f"{where}: weight must be finite, got NaN or Inf; check the checkpoint for overflow")
    try:
        check_bits(bits)
        check_group_size(group_size, weight.shape[1])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if not (isinstance(levels, Tensor) or callable(levels) or levels in LEVELS):
        raise ValueError(f"{where}: levels must be one of {LEVELS} or a function, got {levels!r}; check the spelling")
    if not 0.0 <= damping <= _MAX_DAMPING:
        raise ValueError(f"{where}: damping must be in [0, {_MAX_DAMPING}], got {damping}; 0.01 is usual")
    check_int(where, "block", block, 1, "128 columns are usual")


@dataclass
class Factor:
    """The inverse of a damped Hessian.

    Attributes:
        upper: upper triangular U, float32 [K, K], with (H + damping)^-1 = U^T U.
        importance: float32 [K]: 1 / U_jj^2, the factor of the squared error of column j.
        damping: the damping that was used.
    """

    upper: Tensor
    importance: Tensor = field(init=False)
    damping: float

    def __post_init__(self) -> None:
        self.importance = self.upper.diagonal().square().reciprocal()


def factor_hessian(hessian: Tensor, damping: float, where: str) -> Factor:
    """The factor of a Hessian [K, K], divided by the mean of its diagonal and damped.

    Raises:
        ValueError: as :func:`gptq_quantize_weight`.
    """
    features = hessian.shape[-1]
    if hessian.dim() != 2 or hessian.shape[0] != features:
        raise ValueError(f"{where}: hessian must be [K, K], got shape {tuple(hessian.shape)}; pass X^T X")
    if not bool(torch.isfinite(hessian).all()):
        raise ValueError(
            f"{where}: the Hessian of its inputs must be finite, got NaN or Inf; look for overflow in earlier layers, "
            f"or calibrate in float32"
        )
    damped = hessian.detach().to(torch.float64, copy=True)
    lowest = float(damped.diagonal().min())
    if lowest < 0.0:
        raise ValueError(
            f"{where}: the diagonal of the Hessian must be at least 0, got {lowest}; pass X^T X of the inputs"
        )
    mean = float(damped.diagonal().mean())
    if mean == 0.0:  # all inputs are zero: round to nearest
        return Factor(torch.eye(features, dtype=torch.float32, device=hessian.device), damping)
    # Never more than two matrices in float64 at a time: for 28672 inputs (LLaMA-2-70B) one takes 6.6 GB.
    # With the columns in reverse order, H = L L^T becomes R R^T with an upper triangular R. U is the inverse of R.
    damped = damped.div_(mean).flip(0, 1)
    added = 0.0
    while True:
        damped.diagonal().add_(damping - added)
        added = damping
        lower, info = torch.linalg.cholesky_ex(damped)
        if not int(info) and float(lower.diagonal().min()) ** 2 > features * torch.finfo(torch.float64).eps:
            del damped
            # Columns first: then torch solves in place, and computes as it would without ``out``.
            inverse = torch.eye(features, dtype=torch.float64, device=hessian.device).T
            torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
            del lower
            return Factor(inverse.to(torch.float32).flip(0, 1).contiguous(), damping)
        if damping >= _MAX_DAMPING:
            raise ValueError(
                f"{where}: the Hessian must be positive definite with damping {_MAX_DAMPING}, got an indefinite one; "
                f"pass X^T X of the inputs, and look for overflow in the activations"
            )
        damping = min(max(10 * damping, _FIRST_DAMPING), _MAX_DAMPING)


_Snapper = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(columns of a group [N, length], their importance, tensor scales [N]) -> int8 levels [N, L], float16 scales [N]."""


def _snapper(levels: str | Chooser, bits: int) -> _Snapper:
    if isinstance(levels, str) and levels in UNIFORM_LEVELS:
        choose_range = UNIFORM_LEVELS[levels]

        def uniform(columns: Tensor, importance: Tensor, tensor_scale: Tensor) -> tuple[Tensor, Tensor]:
            low, high = choose_range(columns, bits, importance).unbind(1)
            table, scales = uniform_grid(low, high, bits)
            return table, _stored_scales(scales, tensor_scale)

        return uniform
    if isinstance(levels, str):
        return lambda columns, importance, tensor_scale: _snap(
            kmeans_levels(columns, 2**bits, importance), tensor_scale
        )
    return lambda columns, importance, tensor_scale: _snap(levels(columns, importance), tensor_scale)


def round_to_nearest(weight: Tensor, bits: int, group_size: int, levels: str | Chooser) -> Tensor:
    """The baseline, float32: levels of the same kind for the original weight, and every weight's nearest level."""
    chosen = levels if isinstance(levels, str) else for_each_group(weight, group_size, levels)
    return quantize_weight(weight, bits, group_size, chosen).dequantize()


def quantize_rows(
    weights: Sequence[Tensor],
    factor: Factor,
    bits: int,
    group_size: int,
    levels: str | Tensor | Chooser,
    block: int,
) -> list[PackedWeight]:
    """Quantize weights that share a Hessian as one stacked weight. Rows do not affect each other."""
    stacked = torch.cat([weight.detach().to(torch.float32) for weight in weights])
    rows, in_features = stacked.shape
    if factor.upper.shape[0] != in_features:
        raise ValueError(
            f"the Hessian must be [{in_features}, {in_features}] for a weight of {in_features} columns, got "
            f"{tuple(factor.upper.shape)}; pass the Hessian of this layer's inputs"
        )
    groups = num_groups(in_features, group_size)
    if isinstance(levels, Tensor) and tuple(levels.shape) != (rows, groups, 2**bits):
        raise ValueError(
            f"levels must be [out_features, groups, 2**bits] = {(rows, groups, 2**bits)}, got "
            f"{tuple(levels.shape)}; expand a shared table to every group"
        )
    tensor_scales = torch.cat([torch.full((w.shape[0],), _tensor_scale(w, levels)) for w in weights]).to(stacked.device)
    chosen = levels.to(stacked) if isinstance(levels, Tensor) else _snapper(levels, bits)
    codes, tables, scales = _solve(stacked, factor, group_size, chosen, block, tensor_scales)
    packed = []
    start = 0
    for weight in weights:
        part = slice(start, start + weight.shape[0])
        start = part.stop
        kept, tensor_scale = _normalize(scales[part], float(tensor_scales[part.start]))
        each = PackedWeight.pack(codes[part], tables[part], kept, tensor_scale, bits=bits, group_size=group_size)
        packed.append(each.as_uniform() if isinstance(levels, str) and levels in UNIFORM_LEVELS else each)
    return packed


def _tensor_scale(weight: Tensor, levels: object) -> float:
    largest = float(weight.detach().abs().max() if not isinstance(levels, Tensor) else levels.abs().max())
    if largest == 0.0:
        return 1.0
    exponent = math.frexp(largest / LEVEL_MAX)[1] - 1 - _SCALE_EXPONENT
    return 2.0 ** min(max(exponent, -126), 127)


def _normalize(scales: Tensor, tensor_scale: float) -> tuple[Tensor, float]:
    """Move a power of two between the scales and the tensor scale: the largest scale is then in [128, 256).

    Returns the arguments if a scale would be rounded.
    """
    peak = float(scales.max())
    if peak == 0.0:
        return scales, tensor_scale
    shift = 2.0 ** (math.frexp(peak)[1] - 8)
    moved = (scales.to(torch.float32) / shift).to(torch.float16)
    exact = torch.equal(moved.to(torch.float32) * shift, scales.to(torch.float32))
    return (moved, tensor_scale * shift) if exact and tensor_scale * shift >= 2.0**-126 else (scales, tensor_scale)


def _solve(
    weight: Tensor, factor: Factor, group_size: int, levels: Tensor | _Snapper, block: int, tensor_scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Round all columns of a float32 weight [N, K] with error feedback; overwrites the weight.

    Returns:
        codes uint8 [N, K], levels int8 [N, groups, 2**bits], scales float16 [N, groups].
    """
    in_features = weight.shape[1]
    upper = factor.upper
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    tables, scales = [], []
    # A group's table is chosen from columns with the feedback of all earlier groups, so blocks end where groups end.
    block = max(block // group_size * group_size, group_size)
    for start in range(0, in_features, block):
        stop = min(start + block, in_features)
        current, inside = weight[:, start:stop], upper[start:stop, start:stop]
        errors = torch.empty(current.shape, dtype=torch.float32, device=weight.device)
        for first in range(0, stop - start, group_size):
            last = min(first + group_size, stop - start)
            if isinstance(levels, Tensor):
                table, scale = _snap(levels[:, (start + first) // group_size], tensor_scale)
            else:
                columns = current[:, first:last].contiguous()
                if not bool(torch.isfinite(columns).all()):
                    raise ValueError(f"weights must stay finite, got NaN or Inf: {_DIVERGED}")
                importance = factor.importance[start + first : start + last]
                table, scale = levels(columns, importance.expand(columns.shape), tensor_scale)
            tables.append(table)
            scales.append(scale)
            # These products are exact, so the feedback is computed from the values that are stored.
            values = table.to(torch.float32) * scale.to(torch.float32)[:, None] * tensor_scale[:, None]
            codes[:, start + first : start + last], errors[:, first:last] = gptq_round(
                current, inside, values, first, last
            )
        if stop < in_features:
            weight[:, stop:].addmm_(errors, upper[start:stop, stop:], alpha=-1.0)
    return codes, torch.stack(tables, 1), torch.stack(scales, 1)


def _snap(levels: Tensor, tensor_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Levels [N, L] -> int8 [N, L] and float16 [N], as formats.snap_levels but with a given tensor scale."""
    levels = levels.to(torch.float64)
    largest = levels.abs().amax(1)
    ratio = torch.where(largest > 0, LEVEL_MAX / largest, 0.0)
    return torch.round(levels * ratio[:, None]).to(torch.int8), _stored_scales(largest / LEVEL_MAX, tensor_scale)


def _stored_scales(scales: Tensor, tensor_scale: Tensor) -> Tensor:
    stored = (scales / tensor_scale).to(torch.float16)
    if not bool(torch.isfinite(stored).all()):
        raise ValueError(f"levels must be finite and at most 4096 times the largest weight, got more: {_DIVERGED}")
    return stored
