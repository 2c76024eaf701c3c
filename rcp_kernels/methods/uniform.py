"""Uniform quantization with a learned scale and zero-point per group."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..formats import LEVEL_MAX, PackedWeight, check_bits, check_group_size, num_groups
from ..ops.clip_search import clip_search
from ..ops.nearest_codes import nearest_codes
from .fake_quantize import fake_quantize, group_range
from .level_search import for_each_group

__all__ = ["UniformQuantizer"]


class UniformQuantizer(nn.Module):
    """Fake quantization of a weight to evenly spaced levels, ``scale * (code - zero)``, both numbers learned per group.

    The levels are those that a group needs no table for (ours): in int8 ``a + code * 2**(7 - bits)`` with one integer
    a, so that a float16 scale and a byte are all that is stored beside the codes, and the zero-point is fine to a
    ``2**(bits - 7)`` of a step, a sixteenth with 3 bits. All levels fit int8, so zero lies between the level a step
    below the first one and the last one: weights that are all far from zero get some levels that they do not use.

    The rounding is straight-through (LSQ, Esser et al. 2020, with an offset), that of the zero-point too, so a weight
    inside the range contributes its rounding error to the gradient of the scale, and a clipped one its level's.

    Attributes:
        scale: Parameter float32 [N, ceil(K / group_size)], in units of the weight. A negative one counts as 0.
        zero: Parameter, of the same shape, in codes. One outside the range that fits int8 counts as the range's end.
        bits: 2, 3 or 4.
        group_size: weights along K that share a table.
        weight_shape: (N, K).
    """

    def __init__(
        self,
        weight_shape: Sequence[int],
        bits: int = 3,
        group_size: int = 128,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        """Make a quantizer whose levels are all zero until it is initialized from a weight.

        Args:
            weight_shape: (N, K) = (out_features, in_features).
            bits: 2, 3 or 4.
            group_size: 32, 64, 128 or K.
            device: of the parameters.

        Raises:
            ValueError: bits, group_size or shape outside the format.
        """
        super().__init__()
        if len(weight_shape) != 2 or min(weight_shape) < 1:
            raise ValueError(
                f"UniformQuantizer: weight_shape must be (out_features, in_features), both at least 1, got "
                f"{tuple(weight_shape)}; pass weight.shape"
            )
        self.weight_shape = (int(weight_shape[0]), int(weight_shape[1]))
        self.bits = check_bits(bits)
        self.group_size = check_group_size(group_size, self.weight_shape[1])
        shape = (self.weight_shape[0], num_groups(self.weight_shape[1], group_size))
        self.scale = nn.Parameter(torch.zeros(shape, device=device))
        self.zero = nn.Parameter(torch.zeros(shape, device=device))

    @torch.no_grad()
    def init_uniform(self, weight: Tensor) -> None:
        """Levels from the minimum to the maximum of each group.

        Args:
            weight: floating point [N, K].

        Raises:
            ValueError: another shape.
        """
        self._check(weight)
        self._init_range(*group_range(weight, self.group_size))

    @torch.no_grad()
    def init_clip_search(self, weight: Tensor, importance: Tensor | None = None) -> None:
        """Levels over the range of least squared error, of 72 tried (`rcp_kernels.ops.clip_search`).

        Args:
            weight: floating point [N, K].
            importance: floating point [K], >= 0: counts the error of each column.

        Raises:
            ValueError: another shape.
        """
        self._check(weight)
        count = 2**self.bits
        ratios = for_each_group(
            weight, self.group_size, lambda groups, share: clip_search(groups, count, share), importance
        )
        low, high = group_range(weight, self.group_size)
        self._init_range(low * ratios[..., 0], high * ratios[..., 1])

    def levels(self) -> Tensor:
        """The levels before they are snapped, differentiable: float32 [N, groups, 2**bits]."""
        codes = torch.arange(2**self.bits, dtype=torch.float32, device=self.scale.device)
        zero = self.zero.clamp(-self._last_offset() / self._step(), LEVEL_MAX / self._step())
        return self.scale.clamp(min=0.0)[..., None] * (codes - zero[..., None])

    def forward(self, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The weight as it would be stored, differentiable: the float32 values of ``export(weight).dequantize()``.

        Args:
            weight: floating point [N, K].
            dtype: of the result; that of weight by default.

        Raises:
            ValueError: another shape.
        """
        self._check(weight)
        table = _table(*self._snapped())
        return fake_quantize(weight, self.levels(), self.group_size, dtype=dtype, through_rounding=True, table=table)

    @torch.no_grad()
    def export(self, weight: Tensor) -> PackedWeight:
        """The packed weight; ``export(w).dequantize().to(w.dtype)`` equals ``forward(w)`` bit for bit.

        Raises:
            ValueError: another shape, or NaN or Inf in the weight or the parameters.
        """
        self._check(weight)
        for name, values in (("weight", weight), ("scale", self.scale), ("zero", self.zero)):
            if not bool(torch.isfinite(values).all()):
                raise ValueError(
                    f"UniformQuantizer: {name} must be finite, got NaN or Inf; lower the learning rate of a training "
                    f"that diverged, or check the checkpoint for overflow"
                )
        levels, scales, exponent = self._snapped()
        table = _table(levels, scales, exponent)
        codes = nearest_codes(weight.detach().to(torch.float32), table, self.group_size, packed=True)
        tensor_scale = torch.tensor(2.0**exponent, dtype=torch.float32, device=codes.device)
        rows, in_features = self.weight_shape
        packed = PackedWeight(codes, levels, scales, tensor_scale, self.bits, self.group_size, in_features, rows)
        return packed.validate().as_uniform()

    def _step(self) -> int:
        """Between two int8 levels."""
        return 1 << (7 - self.bits)

    def _last_offset(self) -> int:
        """The largest first level that leaves room for the others."""
        return LEVEL_MAX - (2**self.bits - 1) * self._step()

    @torch.no_grad()
    def _snapped(self) -> tuple[Tensor, Tensor, int]:
        """The int8 levels [N, groups, 2**bits], float16 scales [N, groups], and exponent of the tensor scale."""
        scales = self.scale.clamp(min=0.0) / self._step()
        peak = float(scales.max())
        # The largest scale in [2**7, 2**8), as formats.snap_levels puts it.
        exponent = min(max(math.frexp(peak)[1] - 8, -126), 127) if 0.0 < peak < math.inf else 0
        stored = (scales.to(torch.float64) * 2.0**-exponent).to(torch.float16)
        offset = (-self.zero * self._step()).round_().clamp_(-LEVEL_MAX, self._last_offset())
        codes = torch.arange(2**self.bits, device=offset.device)
        return (offset[..., None] + codes * self._step()).to(torch.int8), stored, exponent

    def extra_repr(self) -> str:
        return f"weight_shape={self.weight_shape}, bits={self.bits}, group_size={self.group_size}"

    def _init_range(self, low: Tensor, high: Tensor) -> None:
        last = 2**self.bits - 1
        # The range reaches so far that its levels fit int8: zero is at most a step below it, and not above it. Equal
        # weights get levels from zero to them, as no scale can put all levels onto one value but zero.
        flat = high <= low
        below = self._last_offset() / self._step()
        low = torch.minimum(low, torch.where(flat, 0.0, high * (below / (below + last))))
        above = LEVEL_MAX / self._step()
        high = torch.maximum(high, torch.where(flat, 0.0, low * (1.0 - last / above)))
        scale = (high - low) / last
        self.scale.copy_(scale)
        self.zero.copy_(torch.where(scale > 0, -low / scale, 0.0))

    def _check(self, weight: Tensor) -> None:
        if tuple(weight.shape) != self.weight_shape:
            raise ValueError(
                f"UniformQuantizer: weight must have the shape {self.weight_shape} that the quantizer was made for, "
                f"got {tuple(weight.shape)}; make one with weight.shape"
            )


def _table(levels: Tensor, scales: Tensor, exponent: int) -> Tensor:
    """The values of the levels, float32, by the products of ``PackedWeight.dequantize``, which are exact."""
    return levels.to(torch.float32) * scales.to(torch.float32)[..., None] * 2.0**exponent
