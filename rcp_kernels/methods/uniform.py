"""Uniform quantization with a learned scale and zero-point per group."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..formats import PackedWeight, check_bits, check_group_size, num_groups
from ..quantize import quantize_weight
from .fake_quantize import fake_quantize, group_range
from .level_search import clip_search, for_each_group

__all__ = ["UniformQuantizer"]


class UniformQuantizer(nn.Module):
    """Fake quantization of a weight to evenly spaced levels, ``scale * (code - zero)``, both numbers learned per group.

    The rounding is straight-through (LSQ, Esser et al. 2020, with an offset), so a weight inside the range contributes
    its rounding error to the gradient of the scale, and a clipped one its level's. The zero-point is a real number:
    the format stores levels, not zero-points, so nothing asks for an integer (ours).

    Attributes:
        scale: Parameter float32 [N, ceil(K / group_size)], in units of the weight. A negative one counts as 0.
        zero: Parameter, of the same shape, in codes.
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
        """Levels over the range of least squared error, of 72 tried (``level_search.clip_search``).

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
        return self.scale.clamp(min=0.0)[..., None] * (codes - self.zero[..., None])

    def forward(self, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The weight as it would be stored, differentiable: the float32 values of ``export(weight).dequantize()``.

        Args:
            weight: floating point [N, K].
            dtype: of the result; that of weight by default.

        Raises:
            ValueError: another shape.
        """
        self._check(weight)
        return fake_quantize(weight, self.levels(), self.group_size, dtype=dtype, through_rounding=True)

    @torch.no_grad()
    def export(self, weight: Tensor) -> PackedWeight:
        """The packed weight; ``export(w).dequantize().to(w.dtype)`` equals ``forward(w)`` bit for bit.

        Raises:
            ValueError: another shape, or NaN or Inf in the weight or the parameters.
        """
        self._check(weight)
        return quantize_weight(weight, self.bits, self.group_size, self.levels())

    def extra_repr(self) -> str:
        return f"weight_shape={self.weight_shape}, bits={self.bits}, group_size={self.group_size}"

    def _init_range(self, low: Tensor, high: Tensor) -> None:
        scale = (high - low) / (2**self.bits - 1)
        # Equal weights: levels from zero to them, as no scale can put all levels onto one value but zero.
        flat = scale <= 0
        low = torch.where(flat, low.clamp(max=0.0), low)
        scale = torch.where(flat, (high.clamp(min=0.0) - low) / (2**self.bits - 1), scale)
        self.scale.copy_(scale)
        self.zero.copy_(torch.where(scale > 0, -low / scale, 0.0))

    def _check(self, weight: Tensor) -> None:
        if tuple(weight.shape) != self.weight_shape:
            raise ValueError(
                f"UniformQuantizer: weight must have the shape {self.weight_shape} that the quantizer was made for, "
                f"got {tuple(weight.shape)}; make one with weight.shape"
            )
