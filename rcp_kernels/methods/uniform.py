"""Uniform quantization with a learned scale and zero-point per group."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..formats import LEVEL_MAX, PackedWeight, tensor_scale_exponent, uniform_step
from ..formats.levels import uniform_range
from ..ops.nearest_codes import nearest_codes
from .fake_quantize import fake_quantize, group_range
from .group_quantizer import GroupQuantizer

__all__ = ["UniformQuantizer"]


class UniformQuantizer(GroupQuantizer):
    """Fake quantization of a weight to evenly spaced levels, ``scale * (code - zero)``, both learned per group.

    The levels are those for which a group stores no table (our choice): int8 ``a + code * 2**(7 - bits)`` with one
    integer a. Beside the codes a group stores a float16 scale and one byte. The zero-point has a resolution of
    ``2**(bits - 7)`` steps, a sixteenth with 3 bits. All levels fit int8, so zero lies between one step below the first
    level and the last level. A group whose weights are all far from zero therefore leaves some levels unused.

    Rounding is straight-through (LSQ, Esser et al. 2020, with an offset), also that of the zero-point. A weight inside
    the range contributes its rounding error to the gradient of the scale; a clipped weight contributes its level.

    Attributes:
        scale: Parameter float32 [N, ceil(K / group_size)], in units of the weight. Negative values count as 0.
        zero: Parameter float32 of the same shape, in codes, clamped to the range in which the levels fit int8.
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
        super().__init__(weight_shape, bits, group_size)
        self.scale = nn.Parameter(torch.zeros(self._groups_shape, device=device))
        self.zero = nn.Parameter(torch.zeros(self._groups_shape, device=device))

    @torch.no_grad()
    def init_uniform(self, weight: Tensor) -> None:
        """Levels from the minimum to the maximum of each group.

        Args:
            weight: floating point [N, K].

        Raises:
            ValueError: the weight has another shape.
        """
        self._check(weight)
        self._init_range(*group_range(weight, self.group_size))

    @torch.no_grad()
    def init_clip_search(self, weight: Tensor, importance: Tensor | None = None) -> None:
        """Levels over the best of 72 ranges by squared error (`rcp_kernels.ops.clip_search`).

        Args:
            weight: floating point [N, K].
            importance: floating point [K], >= 0: factor of each column's error.

        Raises:
            ValueError: the weight has another shape.
        """
        self._check(weight)
        ratios = self._clip_ratios(weight, importance)
        low, high = group_range(weight, self.group_size)
        self._init_range(low * ratios[..., 0], high * ratios[..., 1])

    def levels(self) -> Tensor:
        """The levels before they are snapped, differentiable: float32 [N, groups, 2**bits]."""
        codes = torch.arange(2**self.bits, dtype=torch.float32, device=self.scale.device)
        zero = self.zero.clamp(-self._last_offset() / uniform_step(self.bits), LEVEL_MAX / uniform_step(self.bits))
        return self.scale.clamp(min=0.0)[..., None] * (codes - zero[..., None])

    def forward(self, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The weight as it would be stored, differentiable: the float32 values of ``export(weight).dequantize()``.

        Args:
            weight: floating point [N, K].
            dtype: of the result; the weight's by default.

        Raises:
            ValueError: the weight has another shape.
        """
        self._check(weight)
        table = _table(*self._snapped())
        return fake_quantize(weight, self.levels(), self.group_size, dtype=dtype, through_rounding=True, table=table)

    @torch.no_grad()
    def export(self, weight: Tensor) -> PackedWeight:
        """The packed weight. ``export(w).dequantize().to(w.dtype)`` equals ``forward(w)`` bit for bit.

        Raises:
            ValueError: the weight has another shape, or the weight or the parameters have NaN or Inf.
        """
        self._check(weight)
        for name, values in (("weight", weight), ("scale", self.scale), ("zero", self.zero)):
            if not bool(torch.isfinite(values).all()):
                raise ValueError(
                    f"UniformQuantizer: {name} must be finite, got NaN or Inf; lower the learning rate if a training "
                    f"diverged, or check the checkpoint for overflow"
                )
        levels, scales, exponent = self._snapped()
        table = _table(levels, scales, exponent)
        codes = nearest_codes(weight.detach().to(torch.float32), table, self.group_size, packed=True)
        tensor_scale = torch.tensor(2.0**exponent, dtype=torch.float32, device=codes.device)
        rows, in_features = self.weight_shape
        packed = PackedWeight(codes, levels, scales, tensor_scale, self.bits, self.group_size, in_features, rows)
        return packed.validate().as_uniform()

    def _last_offset(self) -> int:
        """The largest first int8 level for which all levels fit int8."""
        return LEVEL_MAX - (2**self.bits - 1) * uniform_step(self.bits)

    @torch.no_grad()
    def _snapped(self) -> tuple[Tensor, Tensor, int]:
        """The int8 levels [N, groups, 2**bits], float16 scales [N, groups], and exponent of the tensor scale."""
        scales = self.scale.clamp(min=0.0) / uniform_step(self.bits)
        exponent = tensor_scale_exponent(scales)
        stored = (scales.to(torch.float64) * 2.0**-exponent).to(torch.float16)
        offset = (-self.zero * uniform_step(self.bits)).round_().clamp_(-LEVEL_MAX, self._last_offset())
        codes = torch.arange(2**self.bits, device=offset.device)
        return (offset[..., None] + codes * uniform_step(self.bits)).to(torch.int8), stored, exponent

    def _init_range(self, low: Tensor, high: Tensor) -> None:
        last = 2**self.bits - 1
        low, high = uniform_range(low, high, self.bits)
        scale = (high - low) / last
        self.scale.copy_(scale)
        self.zero.copy_(torch.where(scale > 0, -low / scale, 0.0))


def _table(levels: Tensor, scales: Tensor, exponent: int) -> Tensor:
    """The values of the levels, float32, by the same exact products as in ``PackedWeight.dequantize``."""
    return levels.to(torch.float32) * scales.to(torch.float32)[..., None] * 2.0**exponent
